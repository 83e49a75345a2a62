"""Which URLs have been asked for, and in which batch what came of that lies: found by their hashes, in bounded memory.

    downloads/catalogue/00003.json            CatalogueRecord: what all batches of its time say, in two tables
    data/originals/entries-<sha256>.parquet   one row for every URL of them, by the first bits of its hash
    data/originals/batches-<sha256>.parquet   one row for every batch, with what its URLs were asked with

The batches themselves are the truth. A catalogue saves whoever looks for URLs from reading the indexes of tens of
thousands of batches: those alone are read that have come since. It is written anew when they have become many.

A URL that was asked for more than once is where its bytes are; else where it was refused for good; else where it will
be tried by the plan that asks; and where it failed only if there is nothing else. Of several the newest counts. Who
looks for URLs writes down what was found (`links`), so that what comes later changes nothing of that.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare import originals
from data_prep.prepare.originals import Asked, BatchRecord, url_hash
from data_prep.rejections import TRANSIENT, Cause
from data_prep.sources.reading import in_order
from infra import layout
from infra.config import canonical_json
from infra.errors import PixnerdError, StoreUnreachable
from infra.records import DataObject, Record, fetch_data, put_data, read_record, write_record
from infra.shards import parquet_bytes
from infra.store import Store

_log = logging.getLogger(__name__)

BITS = 6  # of a hash, by which URLs are dealt out to piles
PILES = 1 << BITS
FEW = 64  # batches whose indexes are soon read
SHARE = 8  # a catalogue is written anew when what came since is more than this part of it

Hashed = np.dtype([("high", "<u8"), ("low", "<u8")])
Wanted = np.dtype([*Hashed.descr, ("row", "<i8")])
Known = np.dtype([*Hashed.descr, ("batch", "<i4"), ("at", "<i4"), ("cause", "<i4")])  # batch: its place among all
Rows = npt.NDArray[np.void]  # of one of these

CAUSES: list[str | None] = [None, *Cause]  # by their codes
CODES = {cause: code for code, cause in enumerate(CAUSES)}
ENTRIES = pa.schema(
    [
        *(pa.field(name, pa.uint64(), nullable=False) for name in Hashed.names or ()),
        pa.field("batch", pa.int32(), nullable=False),
        pa.field("at", pa.int32(), nullable=False),
        pa.field("cause", pa.dictionary(pa.int8(), pa.string())),
    ]
)
COVERED = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("began", pa.string(), nullable=False),
        pa.field("asked", pa.string(), nullable=False),
    ]
)


class CatalogueRecord(Record):
    entries: DataObject
    batches: DataObject
    urls: int


class Batch(NamedTuple):
    """As far as a catalogue tells of it."""

    name: str
    attempt: int
    began: str
    asked: str  # as JSON, equal for equal settings


class Piles:
    """Rows dealt out by their hashes, in a file without a name; each pile is read back by itself."""

    def __init__(self, kind: np.dtype[np.void]) -> None:
        self._kind = kind
        self._file = TemporaryFile()  # noqa: SIM115 - closed with the object
        self._parts: list[list[tuple[int, int]]] = [[] for _ in range(PILES)]
        self.rows = 0

    def add(self, rows: Rows) -> None:
        pile = rows["high"] >> np.uint64(64 - BITS)
        order = np.argsort(pile, kind="stable")
        ends = np.searchsorted(pile[order], np.arange(1, PILES + 1, dtype=np.uint64)) * self._kind.itemsize
        begin, start = 0, self._file.tell()
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                self._parts[number].append((start + begin, end - begin))
            begin = end
        self._file.write(rows[order].tobytes())
        self.rows += len(rows)

    def read(self, number: int) -> Rows:
        self._file.flush()
        parts = (os.pread(self._file.fileno(), size, start) for start, size in self._parts[number])
        return np.frombuffer(b"".join(parts), self._kind)

    def close(self) -> None:
        self._file.close()


class Catalogue:
    """All that is known when it is opened."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self.states = originals.states(store)
        self.batches: list[Batch] = []
        self._folder = folder
        self._fresh = Piles(Known)
        self._entries: pq.ParquetFile | None = None
        self._open_newest()
        self.covered = sum(map(self.is_current, self.batches))
        self._read_since()

    def close(self) -> None:
        self._fresh.close()
        if self._entries is not None:
            self._entries.close()

    @property
    def since(self) -> int:
        """Batches that the catalogue does not tell of."""
        return len(self.batches) - self._written

    def pile(self, number: int) -> Rows:
        found = [self._fresh.read(number)]
        if self._entries is not None:
            table = self._entries.read_row_group(number)
            causes = table["cause"].combine_chunks()
            codes = np.array([_code(cause) for cause in causes.dictionary.to_pylist()], np.int32)
            places = causes.indices.fill_null(-1).to_numpy()
            rows = np.empty(table.num_rows, Known)
            for name in ("high", "low", "batch", "at"):
                rows[name] = table[name].to_numpy()
            rows["cause"] = np.where(places < 0, 0, codes[places] if len(codes) else 0)
            found.append(rows[self._current[rows["batch"]]])
        return np.concatenate(found)

    def _open_newest(self) -> None:
        keys = list(layout.CATALOGUE.keys(self._store))
        self._written, self._current = 0, np.zeros(0, bool)
        if not keys:
            return
        try:
            record = read_record(self._store, keys[-1], CatalogueRecord)
            for name, found in (("entries", record.entries), ("batches", record.batches)):
                fetch_data(self._store, found, self._folder / name)
            rows = pq.read_table(self._folder / "batches").to_pylist()
            entries = pq.ParquetFile(self._folder / "entries")
            if entries.num_row_groups != PILES or not entries.schema_arrow.equals(ENTRIES):
                raise pa.ArrowInvalid("other piles")
            self.batches, self._entries = [Batch(**row) for row in rows], entries
        except StoreUnreachable:
            raise
        except (PixnerdError, pa.ArrowException, TypeError, KeyError) as error:
            _log.warning("%s cannot be read (%s): the indexes of all downloads are", keys[-1], type(error).__name__)
            return
        self._written = len(self.batches)
        self._current = np.array([self.is_current(batch) for batch in self.batches], bool)

    def is_current(self, batch: Batch) -> bool:
        return self.states.get(batch.name, originals.NOTHING).attempt == batch.attempt

    def _read_since(self) -> None:
        told = {batch.name for batch in self.batches if self.is_current(batch)}
        since = {name: state for name, state in self.states.items() if name not in told and state.attempt >= 0}
        for record, rows in in_order(self._index, originals.records(self._store, since)):
            rows["batch"] = len(self.batches)
            self.batches.append(Batch(record.batch, record.attempt, record.began, canonical_json(record.asked)))
            self._fresh.add(rows)

    def _index(self, record: BatchRecord) -> tuple[BatchRecord, Rows]:
        table = originals.read_index(self._store, record, ["url", "cause"])
        causes = [_code(cause) for cause in table["cause"].to_pylist()]
        at = np.arange(table.num_rows)
        return record, rows_of(Known, hashed(table["url"].to_pylist()), batch=-1, at=at, cause=causes)


def _code(cause: str | None) -> int:
    """What only a newer version knows counts as refused for good."""
    return CODES.get(cause, CODES[Cause.GONE])


def hashed(urls: Sequence[str]) -> Rows:
    return np.frombuffer(b"".join(map(url_hash, urls)), Hashed)


def rows_of(kind: np.dtype[np.void], hashes: Rows, **columns: Any) -> Rows:
    rows = np.empty(len(hashes), kind)
    for name in Hashed.names or ():
        rows[name] = hashes[name]
    for name, values in columns.items():
        rows[name] = values
    return rows


@contextmanager
def opened(store: Store) -> Iterator[Catalogue]:
    with TemporaryDirectory(prefix="pixnerd-catalogue-") as folder:
        found = Catalogue(store, Path(folder))
        try:
            yield found
        finally:
            found.close()


# Which of what is known counts


class Rules:
    """What counts of what is known, and how much, under the settings of now."""

    def __init__(self, known: Catalogue, now: Asked, *, again: bool) -> None:
        """`again`: what failed for a cause that can pass is as good as never asked for."""
        kinds: dict[str, int] = {}
        kind = [kinds.setdefault(batch.asked, len(kinds)) for batch in known.batches]
        ranks = np.empty((len(kinds), len(CAUSES)), np.int64)
        for asked, number in kinds.items():
            ranks[number] = _ranks(json.loads(asked), now, again=again)
        self._ranks, self._kind = ranks, np.array(kind, np.int64)
        dropped = [known.states.get(batch.name, originals.NOTHING).dropped for batch in known.batches]
        self._dropped = np.array(dropped, bool)
        order = sorted(range(len(kind)), key=lambda number: (known.batches[number].began, known.batches[number].name))
        self._age = np.empty(len(kind), np.int64)
        self._age[order] = np.arange(len(kind))

    def preference(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Less than 0 for what counts, and the less the better."""
        rank = self._ranks[self._kind[rows["batch"]], rows["cause"]]
        rank[(rows["cause"] == 0) & self._dropped[rows["batch"]]] = 0
        return np.where(rank > 0, -(rank << 32) - self._age[rows["batch"]], 0)


_THERE, _REFUSED, _COMING, _FAILED = 4, 3, 2, 1
COMING = -(_COMING << 32)  # the preference for what is in a batch that this plan asks for


def _ranks(then: Asked, now: Asked, *, again: bool) -> list[int]:
    """By the codes of causes; 0 for what does not count."""
    open_again = originals.reopened(then, now)
    failed = 0 if again else _FAILED
    return [
        _THERE if cause is None else 0 if cause in open_again else failed if cause in TRANSIENT else _REFUSED
        for cause in CAUSES
    ]


def joined(known: Rows, preference: npt.NDArray[np.int64], wanted: Rows) -> npt.NDArray[np.int64]:
    """For each wanted row the place of the best known one with its hash; where there is none, that of the first wanted
    row with it, counted on from the known ones."""
    high, low = (np.concatenate([known[name], wanted[name]]) for name in ("high", "low"))
    order = np.lexsort((np.concatenate([preference, wanted["row"]]), low, high))
    high, low = high[order], low[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    best = np.empty(len(order), np.int64)
    best[order] = order[begins][np.cumsum(begins) - 1]
    return best[len(known) :]


# Writing


def update(store: Store) -> None:
    """Write the catalogue anew if much has come since."""
    with opened(store) as known, TemporaryDirectory(prefix="pixnerd-catalogue-") as folder:
        if known.since < max(FEW, known.covered // SHARE):
            return
        kept = [number for number, batch in enumerate(known.batches) if known.is_current(batch)]
        places = np.full(len(known.batches), -1, np.int32)
        places[kept] = np.arange(len(kept), dtype=np.int32)
        urls = _write(known, places, Path(folder, "entries"))
        batches = pa.Table.from_pylist([known.batches[number]._asdict() for number in kept], schema=COVERED)
        record = CatalogueRecord(
            entries=put_data(store, layout.ORIGINALS.at(), "entries.parquet", Path(folder, "entries")),
            batches=put_data(store, layout.ORIGINALS.at(), "batches.parquet", parquet_bytes(batches)),
            urls=urls,
        )
        before = list(layout.CATALOGUE.keys(store))
        number = 1 + max((layout.CATALOGUE.parts(key)["number"] for key in before), default=-1)
        if write_record(store, layout.CATALOGUE.at(number=number), record):
            for key in before:
                store.delete(key)


def _write(known: Catalogue, places: npt.NDArray[np.int32], path: Path) -> int:
    urls = 0
    causes = pa.array(CAUSES[1:], pa.string())
    with pq.ParquetWriter(path, ENTRIES, compression="zstd") as writer:
        for number in range(PILES):
            rows = known.pile(number)
            codes = pa.array((rows["cause"] - 1).astype(np.int8), mask=rows["cause"] == 0)
            columns = [rows["high"], rows["low"], places[rows["batch"]], rows["at"]]
            table = [*map(pa.array, columns), pa.DictionaryArray.from_arrays(codes, causes)]
            writer.write_table(pa.Table.from_arrays(table, schema=ENTRIES), row_group_size=max(1, len(rows)))
            urls += len(rows)
    return urls

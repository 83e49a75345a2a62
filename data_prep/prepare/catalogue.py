"""Which URLs have been asked for, and which batch holds the result of each: looked up by hash, in bounded memory.

    downloads/catalogue/00003.json            CatalogueRecord: all batches that there were when it was written
    data/originals/entries-<sha256>.parquet   one row for every URL of these batches, by the first bits of its hash
    data/originals/batches-<sha256>.parquet   one row for every batch, with the settings of its downloads

The batches themselves are the truth. A catalogue is a cache: with it, a lookup reads the indexes of newer batches
only, and not those of tens of thousands. It is written anew when the newer ones have become many.

Where a URL is in several batches, a lookup prefers one that has its bytes; then one where it was refused for good; then
one that the same plan is about to download; and last one where it failed. Of equals the newest counts. The result of a
lookup is written down (`links`), so that later downloads do not change it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
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

BITS = 6  # the first bits of a URL's hash say in which pile it is
PILES = 1 << BITS
FEW = 64  # so many newer batches are quickly read: they are no reason to write a catalogue anew
SHARE = 8  # nor is less than this part (one in 8) of the batches that it covers

Hashed = np.dtype([("high", "<u8"), ("low", "<u8")])
Wanted = np.dtype([*Hashed.descr, ("row", "<i8")])
Known = np.dtype([*Hashed.descr, ("batch", "<i4"), ("at", "<i4"), ("cause", "<i4")])  # `batch`: in `Catalogue.batches`
Rows = npt.NDArray[np.void]  # of one of these three types

CAUSES: list[str | None] = [None, *Cause]  # a cause's code is its place here; None where there are bytes
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
    """A row of the catalogue's table of batches."""

    name: str
    attempt: int
    began: str
    asked: str  # the settings of its downloads as JSON, equal for equal settings


class Piles:
    """Rows in a nameless file, split into piles by the first bits of their hashes; each pile is read back by itself."""

    def __init__(self, kind: np.dtype[np.void]) -> None:
        self._kind = kind
        self._file = TemporaryFile()  # noqa: SIM115 - closed with the object
        self._extents: list[list[tuple[int, int]]] = [[] for _ in range(PILES)]  # of each pile: start and size

    def add(self, rows: Rows) -> None:
        pile = rows["high"] >> np.uint64(64 - BITS)
        order = np.argsort(pile, kind="stable")
        ends = np.searchsorted(pile[order], np.arange(1, PILES + 1, dtype=np.uint64)) * self._kind.itemsize
        begin, start = 0, self._file.tell()
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                self._extents[number].append((start + begin, end - begin))
            begin = end
        self._file.write(rows[order].tobytes())

    def read(self, number: int) -> Rows:
        self._file.flush()
        extents = (os.pread(self._file.fileno(), size, start) for start, size in self._extents[number])
        return np.frombuffer(b"".join(extents), self._kind)

    def close(self) -> None:
        self._file.close()


class Catalogue:
    """All URLs of all batches that there are when it is opened: those of the newest record, and of newer batches."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self.states = originals.states(store)
        self.batches: list[Batch] = []
        self._folder = folder
        self._fresh = Piles(Known)
        self._entries: pq.ParquetFile | None = None
        self._open_newest()
        self.covered = sum(map(self.is_current, self.batches))
        self._read_newer()

    def close(self) -> None:
        self._fresh.close()
        if self._entries is not None:
            self._entries.close()

    @property
    def newer(self) -> int:
        """How many batches the record in the store does not cover."""
        return len(self.batches) - self._written

    def pile(self, number: int) -> Rows:
        piles = [self._fresh.read(number)]
        if self._entries is not None:
            table = self._entries.read_row_group(number)
            causes = table["cause"].combine_chunks()
            codes = np.array([_code(cause) for cause in causes.dictionary.to_pylist()], np.int32)
            places = causes.indices.fill_null(-1).to_numpy()
            rows = np.empty(table.num_rows, Known)
            for name in ("high", "low", "batch", "at"):
                rows[name] = table[name].to_numpy()
            rows["cause"] = np.where(places < 0, 0, codes[places] if len(codes) else 0)
            piles.append(rows[self._current[rows["batch"]]])
        return np.concatenate(piles)

    def _open_newest(self) -> None:
        keys = list(layout.CATALOGUE.keys(self._store))
        self._written, self._current = 0, np.zeros(0, bool)
        if not keys:
            return
        try:
            record = read_record(self._store, keys[-1], CatalogueRecord)
            fetch_data(self._store, record.entries, self._folder / "entries")
            fetch_data(self._store, record.batches, self._folder / "batches")
            rows = pq.read_table(self._folder / "batches").to_pylist()
            entries = pq.ParquetFile(self._folder / "entries")
            if entries.num_row_groups != PILES or not entries.schema_arrow.equals(ENTRIES):
                raise pa.ArrowInvalid("it has other piles or columns")
            self.batches, self._entries = [Batch(**row) for row in rows], entries
        except StoreUnreachable:
            raise
        except (PixnerdError, pa.ArrowException, TypeError, KeyError) as error:
            _log.warning("%s cannot be read (%s): all indexes are read instead", keys[-1], type(error).__name__)
            return
        self._written = len(self.batches)
        self._current = np.array([self.is_current(batch) for batch in self.batches], bool)

    def is_current(self, batch: Batch) -> bool:
        return self.states.get(batch.name, originals.NOTHING).attempt == batch.attempt

    def _read_newer(self) -> None:
        covered = {batch.name for batch in self.batches if self.is_current(batch)}
        newer = {name: state for name, state in self.states.items() if name not in covered}
        for record, rows in in_order(self._index, originals.records(self._store, newer)):
            rows["batch"] = len(self.batches)
            self.batches.append(Batch(record.batch, record.attempt, record.began, canonical_json(record.asked)))
            self._fresh.add(rows)

    def _index(self, record: BatchRecord) -> tuple[BatchRecord, Rows]:
        table = originals.read_index(self._store, record, ["url", "cause"])
        causes = [_code(cause) for cause in table["cause"].to_pylist()]
        at = np.arange(table.num_rows)
        return record, rows_of(Known, hashed(table["url"].to_pylist()), batch=-1, at=at, cause=causes)


def _code(cause: str | None) -> int:
    """A cause that only a newer pixnerd knows counts as refused for good."""
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
    with TemporaryDirectory(prefix="pixnerd-catalogue-") as folder, closing(Catalogue(store, Path(folder))) as known:
        yield known


# Which rows count


class Rules:
    """Which rows of a catalogue a lookup may use under today's settings, and which it prefers."""

    def __init__(self, known: Catalogue, now: Asked, *, again: bool) -> None:
        """`again`: a URL that failed for a cause that may pass counts as never asked for."""
        kinds: dict[str, int] = {}  # the settings that batches were downloaded with, numbered
        kind = [kinds.setdefault(batch.asked, len(kinds)) for batch in known.batches]
        ranks = [_ranks(json.loads(asked), now, again=again) for asked in kinds]
        self._ranks = np.array(ranks, np.int64).reshape(len(kinds), len(CAUSES))
        self._kind = np.array(kind, np.int64)
        dropped = [known.states.get(batch.name, originals.NOTHING).dropped for batch in known.batches]
        self._dropped = np.array(dropped, bool)
        order = sorted(range(len(kind)), key=lambda number: (known.batches[number].began, known.batches[number].name))
        self._age = np.empty(len(kind), np.int64)
        self._age[order] = np.arange(len(kind))

    def preference(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Below 0 for a row that counts, the lower the better; 0 for one that does not."""
        rank = self._ranks[self._kind[rows["batch"]], rows["cause"]]
        rank[(rows["cause"] == 0) & self._dropped[rows["batch"]]] = 0
        return np.where(rank > 0, -(rank << 32) - self._age[rows["batch"]], 0)


_HAS_BYTES, _REFUSED, _COMING, _FAILED = 4, 3, 2, 1
COMING = -(_COMING << 32)  # the preference for a URL of a batch that this plan will download


def _ranks(then: Asked, now: Asked, *, again: bool) -> list[int]:
    """The rank of a row by the code of its cause, the higher the better; 0 if it does not count."""
    open_again = originals.reopened(then, now)
    failed = 0 if again else _FAILED
    return [
        _HAS_BYTES if cause is None else 0 if cause in open_again else failed if cause in TRANSIENT else _REFUSED
        for cause in CAUSES
    ]


def joined(known: Rows, preference: npt.NDArray[np.int64], wanted: Rows) -> npt.NDArray[np.int64]:
    """For each wanted row the place of the preferred known row with its hash.

    Where no known row has it: len(known) + the place of the first wanted row that does.
    """
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
    """Write the catalogue anew if it covers too few of the batches."""
    with opened(store) as known, TemporaryDirectory(prefix="pixnerd-catalogue-") as folder:
        if known.newer < max(FEW, known.covered // SHARE):
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
        older = list(layout.CATALOGUE.keys(store))
        number = 1 + max((layout.CATALOGUE.parts(key)["number"] for key in older), default=-1)
        if write_record(store, layout.CATALOGUE.at(number=number), record):
            for key in older:
                store.delete(key)


def _write(known: Catalogue, places: npt.NDArray[np.int32], path: Path) -> int:
    """Write the table of entries and return its length; `places` are the new places of batches."""
    urls = 0
    causes = pa.array(CAUSES[1:], pa.string())
    with pq.ParquetWriter(path, ENTRIES, compression="zstd") as writer:
        for number in range(PILES):
            rows = known.pile(number)
            codes = pa.array((rows["cause"] - 1).astype(np.int8), mask=rows["cause"] == 0)
            columns = [rows["high"], rows["low"], places[rows["batch"]], rows["at"]]
            arrays = [*map(pa.array, columns), pa.DictionaryArray.from_arrays(codes, causes)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=ENTRIES), row_group_size=max(1, len(rows)))
            urls += len(rows)
    return urls

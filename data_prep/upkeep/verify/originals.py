"""Downloaded originals, and what tells of them: batches, the links of lists to them, retries, the catalogue.

What of a batch is damaged decides what goes. Without its tar its failures stay what they were, and what had come is
downloaded once more where it is needed; without its index it is nothing, and no other list may be linked to it. The
catalogue only saves time. What a retry tries again is told nowhere else: its damage is told, and it stays.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.prepare import links, originals
from data_prep.prepare.catalogue import CatalogueRecord
from data_prep.prepare.links import LinksRecord
from data_prep.prepare.originals import BatchRecord, State
from data_prep.prepare.retries import RetryRecord
from data_prep.sources.reading import in_order
from data_prep.upkeep.verify.looking import Looked, Report, looked
from infra import layout
from infra.errors import RecordError
from infra.files import sha256_of
from infra.records import DataObject, fetch_data, read_record
from infra.shards import read_parquet
from infra.store import Store

TARS = 2  # that are read at once

Row = dict[str, Any]


class _Batch(NamedTuple):
    name: str
    state: State

    @property
    def key(self) -> str:
        return originals.batch_key(self.name, self.state.attempt)


class _Seen(NamedTuple):
    record: BatchRecord | None  # if it can be read
    itself: Looked  # the record and its index
    tar: Looked


class Originals(Report):
    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.batches = 0
        self.tars: list[str] = []  # keys of the records of batches whose tars are to be downloaded again
        self.again: list[str] = []  # keys of records that say that something is there
        self._what: dict[str, str] = {}  # records that cannot be used -> what people call them
        self._of: dict[str, list[str]] = {}  # what each names, or may have named
        self._useless: list[str] = []  # tars
        self._lost: set[str] = set()  # batches that are nothing any more

    def read(self) -> None:
        found = [_Batch(name, state) for name, state in originals.states(self.store).items() if state.attempt >= 0]
        for batch, seen in zip(found, in_order(self._seen, found, TARS), strict=True):
            self.batches += 1
            self._note(batch, seen)
        self._read_lists()
        for key in layout.CATALOGUE.keys(self.store):
            self._look(key, f"the catalogue {Path(key).stem}", self._catalogue_problems)

    def objects(self) -> list[str]:
        """The damaged ones, and tars that are not what their indexes say."""
        keys = {key: self._what[record] for record in self._what for key in self._of.get(record, [])}
        return list(dict.fromkeys([*self.damaged(keys, lambda key: keys[key]), *self._useless]))

    # Batches

    def _note(self, batch: _Batch, seen: _Seen) -> None:
        what, record = f"originals {batch.name}", seen.record
        if self.note(what, seen.itself):
            dropped = layout.DROPPED.at(batch=batch.name, attempt=batch.state.attempt)
            self.again += [batch.key, *([dropped] if self.store.exists(dropped) else [])]
            self._lost.add(batch.name)
            named = _objects(record) if record else self.store.list(layout.ORIGINALS.named(batch.name))
            self._what[batch.key], self._of[batch.key] = what, [found.key for found in named]
        elif self.note(what, seen.tar) and record is not None and record.tar is not None:
            self.tars.append(batch.key)
            self._useless += [record.tar.key] if self.store.exists(record.tar.key) else []

    def _seen(self, batch: _Batch) -> _Seen:
        found: list[tuple[BatchRecord, pa.Table]] = []
        itself = looked(partial(self._index_problems, batch, found))
        tar = Looked([], [])
        if found and not itself.problems and not batch.state.dropped:
            tar = looked(partial(self._tar_problems, *found[0]))
        return _Seen(found[0][0] if found else None, itself, tar)

    def _index_problems(self, batch: _Batch, found: list[tuple[BatchRecord, pa.Table]]) -> Iterator[str]:
        record = originals.read_batch(self.store, batch.name, batch.state.attempt)
        start = layout.ORIGINALS.named(batch.name)
        own = (record.batch, record.attempt) == (batch.name, batch.state.attempt)
        if not own or any(one.key.partition(one.sha256)[0] != start for one in _objects(record)):
            raise RecordError("its record speaks of another batch", remedy="download it again")
        found.append((record, originals.SCHEMA.empty_table()))
        table = read_parquet(self.store, record.index, originals.SCHEMA.names)
        found[0] = record, table
        causes = Counter(cause for cause in table["cause"].to_pylist() if cause is not None)
        if causes != record.rejected or table.num_rows != record.accepted + causes.total():
            yield "its index and its record count differently"
        if (record.tar is None) != (not record.accepted):
            yield "it has images and no tar, or a tar and no images"

    def _tar_problems(self, record: BatchRecord, table: pa.Table) -> Iterator[str]:
        if record.tar is None:
            return
        rows = table.filter(pc.is_null(table["cause"])).sort_by("offset").to_pylist()
        with TemporaryDirectory(prefix="pixnerd-verify-") as folder:
            path = Path(folder, "originals.tar")
            self.store.download(record.tar.key, path)
            if sha256_of(path) != record.tar.sha256:
                yield "its tar does not have the hash in its name"
            yield from _member_problems(path, rows)

    # Lists and the catalogue

    def _read_lists(self) -> None:
        linked: list[LinksRecord] = []
        for key in layout.RETRY.keys(self.store):
            for problem in looked(partial(self._retry_problems, key)).problems:
                self.lasts(_list_name(layout.RETRY, key), problem)
        for key in layout.LINKS.keys(self.store):
            self._look(key, _list_name(layout.LINKS, key), partial(self._links_problems, linked))
        for record in linked if self._lost else ():
            if record.at.key not in self.again and self._lost & self._borrowed(record):
                self.again.append(record.at.key)

    def _look(self, key: str, what: str, problems: Callable[[str], Iterator[str]]) -> None:
        if self.note(what, looked(partial(problems, key))):
            self.again.append(key)
            self._what[key] = what

    def _links_problems(self, linked: list[LinksRecord], key: str) -> Iterator[str]:
        record = read_record(self.store, key, LinksRecord)
        if record.at.key != key:
            raise RecordError("its record speaks of another list", remedy="look its URLs up again")
        linked.append(record)
        self._of[key] = [record.links.key, record.asked.key]
        yield from self._table_problems(record.links, record.rows)
        yield from self._table_problems(record.asked, record.urls)

    def _borrowed(self, record: LinksRecord) -> set[str]:
        """The batches that a list is linked to and does not ask for itself."""
        with links.opened(self.store, record) as file:
            firsts = range(0, record.rows, links.GROUP)
            found = {n for at in firsts for n in file.slice(at, min(links.GROUP, record.rows - at)).names}
        return found - {batch.name for batch in links.asked(self.store, record)}

    def _retry_problems(self, key: str) -> Iterator[str]:
        record = read_record(self.store, key, RetryRecord)
        yield from self._table_problems(record.table, record.rows)

    def _catalogue_problems(self, key: str) -> Iterator[str]:
        record = read_record(self.store, key, CatalogueRecord)
        self._of[key] = [record.entries.key, record.batches.key]
        yield from self._table_problems(record.entries, record.urls)
        yield from self._table_problems(record.batches, None)

    def _table_problems(self, table: DataObject, rows: int | None) -> Iterator[str]:
        with TemporaryDirectory(prefix="pixnerd-verify-") as folder:
            path = Path(folder, "table.parquet")
            fetch_data(self.store, table, path)
            count = pq.read_metadata(path).num_rows
            if rows is not None and count != rows:
                yield f"{table.key} has {count} rows, and by its record {rows}"


def _list_name(place: layout.Place, key: str) -> str:
    parts = place.parts(key)
    return f"the list {parts['list']}, generation {parts['generation']}"


def _objects(record: BatchRecord) -> list[DataObject]:
    return [record.index, *([] if record.tar is None else [record.tar])]


def _member_problems(path: Path, rows: list[Row]) -> Iterator[str]:
    """`rows` of all images, in the order of the tar."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        named = [member.name.partition(".")[0] for member in members]
        if named != [originals.url_hash(row["url"]).hex() for row in rows]:
            yield "its tar does not hold what its index says"
            return
    with path.open("rb") as file:
        for member, row in zip(members, rows, strict=True):
            file.seek(row["offset"])
            if (member.offset_data, member.size) != (row["offset"], row["length"]):
                yield f"{member.name} is not where the index says"
            elif hashlib.sha256(file.read(row["length"])).digest() != row["sha256"]:
                yield f"{member.name} is not what was downloaded"

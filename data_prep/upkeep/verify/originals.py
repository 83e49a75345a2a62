"""Downloaded originals and the tables that refer to them: batches, the links of lists, retries, the catalogue.

What must be deleted depends on what is damaged:
- the tar of a batch: the tar goes and is downloaded again where it is needed; the failures in the index stay valid
- the record or the index of a batch: the batch goes, and so do the links to it of lists that did not ask for it
- the links of a list, the catalogue: they go and are made anew
- a retry: nothing goes, as its rows are recorded nowhere else; its damage is only reported
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.prepare import links, originals
from data_prep.prepare.catalogue import CatalogueRecord
from data_prep.prepare.links import LinksRecord
from data_prep.prepare.originals import BatchRecord, Row, State
from data_prep.prepare.retries import RetryRecord
from data_prep.sources.reading import in_order
from data_prep.upkeep.verify.report import Findings, Report, examine, index_and_tar
from infra import layout
from infra.errors import RecordError
from infra.files import sha256_of
from infra.records import DataObject, fetch_data, read_record
from infra.shards import read_parquet
from infra.store import Store

TARS = 2  # tars that are read at once


class _Batch(NamedTuple):
    name: str
    state: State

    @property
    def key(self) -> str:
        return originals.batch_key(self.name, self.state.attempt)


class _Checked(NamedTuple):
    record: BatchRecord | None  # None if it cannot be read
    contents: Findings  # of the record and its index
    tar: Findings


class Originals(Report):
    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.batches = 0
        self.tars: list[str] = []  # keys of the records of batches whose tars are to be downloaded again
        self.again: list[str] = []  # keys of records that must go, so that what they name is made again
        self._names: dict[str, str] = {}  # key of such a record -> its name in messages
        self._data: dict[str, list[str]] = {}  # key of a record -> keys of the objects that it names, or may name
        self._useless: list[str] = []  # keys of tars that are not what their indexes say
        self._lost: set[str] = set()  # batches whose record or index is damaged

    def read(self) -> None:
        batches = [_Batch(name, state) for name, state in originals.states(self.store).items() if state.attempt >= 0]
        self.batches = len(batches)
        for batch, checked in zip(batches, in_order(self._checked, batches, TARS), strict=True):
            self._note(batch, checked)
        self._read_lists()
        for key in layout.CATALOGUE.keys(self.store):
            self._check(key, f"the catalogue {Path(key).stem}", self._catalogue_problems)

    def objects(self) -> list[str]:
        """The damaged objects of records that must go, and tars that are not what their indexes say."""
        names = {key: name for record, name in self._names.items() for key in self._data.get(record, [])}
        return list(dict.fromkeys([*self.damaged(names), *self._useless]))

    # Batches

    def _note(self, batch: _Batch, checked: _Checked) -> None:
        name, record = f"originals {batch.name}", checked.record
        if self.note(name, checked.contents):
            dropped = layout.DROPPED.at(batch=batch.name, attempt=batch.state.attempt)
            self.again += [batch.key, *([dropped] if self.store.exists(dropped) else [])]
            self._lost.add(batch.name)
            objects = index_and_tar(record) if record else self.store.list(layout.ORIGINALS.named(batch.name))
            self._names[batch.key], self._data[batch.key] = name, [data.key for data in objects]
        elif self.note(name, checked.tar) and record is not None and record.tar is not None:
            self.tars.append(batch.key)
            self._useless += [record.tar.key] if self.store.exists(record.tar.key) else []

    def _checked(self, batch: _Batch) -> _Checked:
        records: list[BatchRecord] = []
        tables: list[pa.Table] = []
        contents, tar = examine(partial(self._index_problems, batch, records, tables)), Findings([], [])
        if tables and not contents.damage and not batch.state.dropped:
            tar = examine(partial(self._tar_problems, records[0], tables[0]))
        return _Checked(records[0] if records else None, contents, tar)

    def _index_problems(self, batch: _Batch, records: list[BatchRecord], tables: list[pa.Table]) -> Iterator[str]:
        """The record and its index are added to `records` and `tables` as soon as they are read."""
        record = originals.read_batch(self.store, batch.name, batch.state.attempt)
        start = layout.ORIGINALS.named(batch.name)
        own = (record.batch, record.attempt) == (batch.name, batch.state.attempt)
        if not own or any(data.key.partition(data.sha256)[0] != start for data in index_and_tar(record)):
            raise RecordError("its record speaks of another batch", remedy="download it again")
        records.append(record)
        table = read_parquet(self.store, record.index, originals.SCHEMA.names)
        tables.append(table)
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
            for problem in examine(partial(self._retry_problems, key)).damage:
                self.note_lasting(_list_name(layout.RETRY, key), problem)
        for key in layout.LINKS.keys(self.store):
            self._check(key, _list_name(layout.LINKS, key), partial(self._links_problems, linked))
        for record in linked if self._lost else ():
            if record.at.key not in self.again and self._lost & self._borrowed(record):
                self.again.append(record.at.key)

    def _check(self, key: str, name: str, problems: Callable[[str], Iterator[str]]) -> None:
        if self.note(name, examine(partial(problems, key))):
            self.again.append(key)
            self._names[key] = name

    def _links_problems(self, linked: list[LinksRecord], key: str) -> Iterator[str]:
        record = read_record(self.store, key, LinksRecord)
        if record.at.key != key:
            raise RecordError("its record speaks of another list", remedy="look its URLs up again")
        linked.append(record)
        self._data[key] = [record.links.key, record.asked.key]
        yield from self._table_problems(record.links, record.rows)
        yield from self._table_problems(record.asked, record.urls)

    def _borrowed(self, record: LinksRecord) -> set[str]:
        """The batches that a list is linked to and does not ask for itself."""
        names = {name for _, part in links.slices(self.store, record) for name in part.names}
        return names - {batch.name for batch in links.asked(self.store, record)}

    def _retry_problems(self, key: str) -> Iterator[str]:
        record = read_record(self.store, key, RetryRecord)
        yield from self._table_problems(record.table, record.rows)

    def _catalogue_problems(self, key: str) -> Iterator[str]:
        record = read_record(self.store, key, CatalogueRecord)
        self._data[key] = [record.entries.key, record.batches.key]
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


def _member_problems(path: Path, rows: list[Row]) -> Iterator[str]:
    """Compare the members of a tar with the `rows` of the index that have an image, which are in the tar's order."""
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

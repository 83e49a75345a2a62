"""The links of a list of URLs: for each of its rows the batch that holds its original, and the place in that batch.

    downloads/lists/<place>/<generation>/links.json   LinksRecord: written once, by the first driver that gets there
    data/originals/links-<sha256>.parquet             a row for every row of the list; null for what is no URL
    data/originals/asked-<sha256>.parquet             the URLs that this list is the first to ask for, batch by batch

Links are made before anything is downloaded (`linking`), and later downloads never change them: two drivers, a second
run and another size make their shards of the same originals. The place is the digest of the list and of the settings
that decide what may be downloaded; a later generation holds those rows of the list that are tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare.originals import Asked, Missing, asked_with, chosen_of
from data_prep.sources import UrlSource, parquet
from data_prep.sources.folders import StoreFolder
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.config import digest
from infra.errors import DataError, SettingsError
from infra.records import DataObject, Record, read_record
from infra.store import Store

GROUP = 1 << 16  # rows of links in a row group
BATCHES_READ = 16  # batches of URLs in a row group: one of a thousand rows is not worth its place in the footer

LINKS = pa.schema([pa.field("batch", pa.dictionary(pa.int32(), pa.string())), pa.field("at", pa.int32())])
ASKED = pa.schema(
    [
        pa.field("batch", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("url", pa.string(), nullable=False),
    ]
)


class At(NamedTuple):
    """Where a list's links lie."""

    place: str
    generation: int = 0

    @property
    def key(self) -> str:
        return layout.LINKS.at(list=self.place, generation=self.generation)


class LinksRecord(Record):
    place: str
    generation: int
    rows: int
    links: DataObject
    asked: DataObject
    urls: int  # of `asked`
    asked_with: Asked
    others: list[str]  # keys of the records of other lists whose batches it is linked to and were not yet downloaded

    @property
    def at(self) -> At:
        return At(self.place, self.generation)


def place(source: UrlSource, name: str, sha256: str, settings: FetchSettings) -> str:
    """The place of the links of an input, which is a list of URLs."""
    asked = {"column": source.image, **chosen_of(asked_with(settings, source.max_bytes))}
    return digest({"input": [name, sha256], "asked": asked})


def read_links(store: Store, at: At) -> LinksRecord | None:
    return read_record(store, at.key, LinksRecord) if store.exists(at.key) else None


class Slice(NamedTuple):
    """The links of some rows."""

    names: list[str]  # of the batches that these rows are linked to
    codes: npt.NDArray[np.int64]  # for each row, the place of its batch among `names`; -1: no URL
    at: npt.NDArray[np.int32]  # for each row, its place in the batch


class Links:
    """A table of links, read by row groups; the last two are kept in memory."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._group = lru_cache(2)(file.read_row_group)

    def slice(self, first: int, rows: int) -> Slice:
        groups = range(first // GROUP, -(-(first + rows) // GROUP))
        table = pa.concat_tables([self._group(number) for number in groups]).unify_dictionaries()
        table = table.slice(first - groups[0] * GROUP, rows).combine_chunks()
        batch = table["batch"].chunk(0)
        used, codes = np.unique(batch.indices.fill_null(-1).to_numpy(), return_inverse=True)
        nothing = bool(len(used) and used[0] < 0)
        names = batch.dictionary.take(pa.array(used[nothing:])).to_pylist()
        return Slice(names, codes - nothing, table["at"].chunk(0).fill_null(0).to_numpy())


@contextmanager
def opened(store: Store, record: LinksRecord) -> Iterator[Links]:
    with _opened(store, record, record.links) as file:
        yield Links(file)


def slices(store: Store, record: LinksRecord) -> Iterator[tuple[int, Slice]]:
    """All links of a list, by row groups, each with the number of its first row."""
    with opened(store, record) as file:
        for first in range(0, record.rows, GROUP):
            yield first, file.slice(first, min(GROUP, record.rows - first))


@contextmanager
def _opened(store: Store, record: LinksRecord, table: DataObject) -> Iterator[pq.ParquetFile]:
    lost = DataError(
        f"{store.url}/{table.key}, which tells of the downloads of a list, is gone or damaged",
        remedy=f"delete {store.url}/{record.at.key}, and run again: the URLs are looked up once more",
    )
    try:
        file = StoreFolder(store).open(table.key)
    except SettingsError:
        raise lost from None
    with file:
        try:
            yield pq.ParquetFile(file, buffer_size=parquet.BUFFER)
        except (pa.ArrowException, OSError):
            raise lost from None


class Batch(NamedTuple):
    """A batch that a list is the first to ask for."""

    name: str
    number: int  # among the batches of its list
    urls: int  # how many


def batches(store: Store, record: LinksRecord) -> Iterator[tuple[Batch, pa.Array]]:
    """The batches that a list asks for, each with its URLs."""
    numbers = count()
    with _opened(store, record, record.asked) as file:
        for group in range(file.num_row_groups):
            for name, urls in _urls_by_batch(file.read_row_group(group)):
                yield Batch(name, next(numbers), len(urls)), urls


def asked(store: Store, record: LinksRecord) -> list[Batch]:
    """The batches that a list asks for, without reading their URLs."""
    batches: list[Batch] = []
    with _opened(store, record, record.asked) as file:
        for group in range(file.num_row_groups):
            names = file.read_row_group(group, columns=["batch"])["batch"].combine_chunks()
            counts = np.bincount(names.indices.to_numpy(), minlength=len(names.dictionary)).tolist()
            batches += map(Batch, names.dictionary.to_pylist(), count(len(batches)), counts)
    return batches


def _urls_by_batch(table: pa.Table) -> Iterator[tuple[str, pa.Array]]:
    batch, urls = table["batch"].combine_chunks(), table["url"].combine_chunks()
    ends = np.searchsorted(batch.indices.to_numpy(), np.arange(len(batch.dictionary)), "right").tolist()
    for name, first, end in zip(batch.dictionary.to_pylist(), [0, *ends], ends, strict=False):
        yield name, urls.slice(first, end - first)


def missing(store: Store, record: LinksRecord, batch: Batch) -> Missing:
    """What to download for a batch that was never downloaded."""
    with _opened(store, record, record.asked) as file:
        table = file.read_row_group(batch.number // BATCHES_READ)
    urls = dict(_urls_by_batch(table))[batch.name].to_pylist()
    return Missing(batch.name, 0, list(enumerate(urls)), {})


def changed(name: str) -> DataError:
    return DataError(f"{name} has changed since it was planned", remedy="run prepare again")

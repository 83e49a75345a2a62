"""A snapshot's selection, as a table on the machine's disk that all ranks map into memory.

A selection of millions of rows with their captions would fill the memory of every rank. So it is rewritten once a
machine, piece by piece, as an Arrow file in the cache. A row's captions are read from it when its image is, and what
was read is the page cache's, which the machine can take back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import DataError
from infra.records import DataObject, fetch_data
from infra.store import Store
from training.loader.cache import Folder

_LAYOUT = 1  # raised when `_convert` writes something else, so that an older file in a cache is not misread
_ROWS = 16384  # of a batch of the Arrow file
_COLUMNS = ("key", "offset", "length", "width", "height", "captions", "caption_weights")
_GROWTH = 8  # what a compressed selection's captions may grow by, for the cache's bound


class Sample(NamedTuple):
    """Where a row's image lies, and its size."""

    key: str
    tar: str
    offset: int
    length: int
    height: int
    width: int


class Selection:
    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        shards = json.loads(self._file.schema.metadata[b"shards"])
        self.tars: list[str] = [tar for tar, _ in shards]
        self.rows_per_shard = np.array([rows for _, rows in shards], dtype=np.int64)
        self._ends = np.cumsum(self.rows_per_shard)
        self._batches: dict[int, pa.RecordBatch] = {}

    @classmethod
    def open(cls, store: Store, selection: DataObject, folder: Folder) -> Selection:
        name = f"{selection.sha256}-{_LAYOUT}.arrow"
        path = folder.made(name, partial(_fetch, store, selection), selection.size * _GROWTH, _is_whole)
        folder.kept.add(path)
        return cls(path)

    def sample(self, row: int) -> Sample:
        values = {name: self._value(row, name).as_py() for name in _COLUMNS[:5]}
        return Sample(tar=self.tars[int(np.searchsorted(self._ends, row, side="right"))], **values)

    def captions(self, row: int) -> tuple[list[str], list[float]]:
        """A row's captions and their weights."""
        texts, weights = (self._value(row, name).as_py() for name in _COLUMNS[5:])
        return texts, weights

    def _value(self, row: int, name: str) -> Any:
        number, within = divmod(row, _ROWS)
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = self._file.get_batch(number)
        return batch.column(_COLUMNS.index(name))[within]


def _is_whole(path: Path) -> bool:
    """An Arrow file's end tells where its batches are, so one that was cut cannot be opened."""
    try:
        Selection(path)
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _fetch(store: Store, selection: DataObject, path: Path) -> None:
    parquet = path.with_name("selection.parquet")
    fetch_data(store, selection, parquet)
    try:
        _convert(parquet, path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{store.url}/{selection.key} is not a readable table ({error})",
            remedy="it was written by another program or version: run `pixnerd data verify --drop-damaged`, then again",
        ) from None


def _convert(parquet: Path, path: Path) -> None:
    """Rewrite a selection in batches of `_ROWS` rows, with a list of its tars and their rows as metadata."""
    source = pq.ParquetFile(parquet)
    schema = pa.schema([source.schema_arrow.field(name) for name in _COLUMNS])
    schema = schema.with_metadata({"shards": json.dumps(_shards(source))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in _batches(source, schema):
            writer.write_batch(batch)


def _shards(source: pq.ParquetFile) -> list[tuple[str, int]]:
    """The tars in the order of their rows, and how many rows each has."""
    shards: list[tuple[str, int]] = []
    for batch in source.iter_batches(_ROWS, columns=["tar"]):
        for run in _runs(batch.column(0)):
            if shards and shards[-1][0] == run[0]:
                shards[-1] = (run[0], shards[-1][1] + run[1])
            else:
                shards.append(run)
    if len({tar for tar, _ in shards}) < len(shards):
        raise DataError("the selection's rows are not in the order of their shards", remedy="make it anew")
    return shards


def _runs(tars: pa.Array) -> Iterator[tuple[str, int]]:
    """Equal neighbours and their number."""
    encoded = tars if isinstance(tars, pa.DictionaryArray) else tars.dictionary_encode()
    indices = encoded.indices.to_numpy()
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
        yield encoded.dictionary[int(indices[start])].as_py(), int(end - start)


def _batches(source: pq.ParquetFile, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of `_ROWS` rows, however the source is cut; only the last may be shorter."""
    held = schema.empty_table()
    for batch in source.iter_batches(_ROWS, columns=list(_COLUMNS)):
        held = pa.concat_tables([held, pa.Table.from_batches([batch.select(_COLUMNS)]).cast(schema)])
        while held.num_rows >= _ROWS:
            yield held.slice(0, _ROWS).combine_chunks().to_batches()[0]
            held = held.slice(_ROWS)
    if held.num_rows:
        yield held.combine_chunks().to_batches()[0]

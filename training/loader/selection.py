"""A snapshot's selection, as a table on the machine's disk that all ranks map into memory.

A selection of millions of rows with their captions would fill the memory of every rank. So it is rewritten once a
machine, piece by piece, as an Arrow file in the cache. A row's captions are read from it when its image is, and what
was read is the page cache's, which the machine can take back. A shard's rows are ordered by the sizes of their images
there, so that the rows of one bucket lie together.

Shapes: S shards, K buckets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
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

_LAYOUT = 2  # raised when `_convert` writes something else, so that an older file in a cache is not misread
_ROWS = 16384  # of a batch of the Arrow file
_COLUMNS = ("key", "offset", "length", "width", "height", "captions", "caption_weights")
_LABEL = "label"  # the column that only selections for training by labels have
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
        self.rows_SK = np.array([rows for _, rows in shards], dtype=np.int64).reshape(len(shards), -1 if shards else 0)
        self.sizes: list[tuple[int, int]] = [tuple(size) for size in json.loads(self._file.schema.metadata[b"sizes"])]
        self.labelled = _LABEL in self._file.schema.names
        self._places = {name: place for place, name in enumerate(self._file.schema.names)}
        self._ends = np.cumsum(self.rows_SK.sum(1))
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

    def label(self, row: int) -> int:
        return int(self._value(row, _LABEL).as_py())

    def _value(self, row: int, name: str) -> Any:
        number, within = divmod(row, _ROWS)
        batch = self._batches.get(number)
        if batch is None:
            batch = self._batches[number] = self._file.get_batch(number)
        return batch.column(self._places[name])[within]


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
    """Rewrite a selection in batches of `_ROWS` rows; its metadata list its buckets, and its tars' rows of each.

    The buckets are all sizes that occur, from the lowest to the highest.
    """
    source = pq.ParquetFile(parquet)
    names = [*_COLUMNS, *([_LABEL] if _LABEL in source.schema_arrow.names else [])]
    schema = pa.schema([source.schema_arrow.field(name) for name in names])
    shards = _shards(source)
    sizes = sorted(set().union(*(of_shard for _, of_shard in shards)))
    told = {"shards": [(tar, [of_shard[size] for size in sizes]) for tar, of_shard in shards], "sizes": sizes}
    schema = schema.with_metadata({name: json.dumps(value) for name, value in told.items()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in _batches(_by_shard(source, schema, [sizes.total() for _, sizes in shards]), schema):
            writer.write_batch(batch)


_Sizes = Counter[tuple[int, int]]  # height, width -> rows


def _shards(source: pq.ParquetFile) -> list[tuple[str, _Sizes]]:
    """The tars in the order of their rows, and how many rows of each size they have."""
    shards: list[tuple[str, _Sizes]] = []
    for batch in source.iter_batches(_ROWS, columns=["tar", "height", "width"]):
        sides = np.stack([batch.column(name).to_numpy() for name in ("height", "width")], 1)
        for tar, start, end in _runs(batch.column("tar")):
            if not shards or shards[-1][0] != tar:
                shards.append((tar, Counter()))
            pairs, counts = np.unique(sides[start:end], axis=0, return_counts=True)
            shards[-1][1].update({(h, w): n for (h, w), n in zip(pairs.tolist(), counts.tolist(), strict=True)})
    if len({tar for tar, _ in shards}) < len(shards):
        raise DataError("the selection's rows are not in the order of their shards", remedy="make it anew")
    return shards


def _runs(tars: pa.Array) -> Iterator[tuple[str, int, int]]:
    """Equal neighbours: their value, and where they begin and end."""
    encoded = tars if isinstance(tars, pa.DictionaryArray) else tars.dictionary_encode()
    indices = encoded.indices.to_numpy()
    starts = np.flatnonzero(np.diff(indices, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
        yield encoded.dictionary[int(indices[start])].as_py(), start, end


def _by_shard(source: pq.ParquetFile, schema: pa.Schema, rows: list[int]) -> Iterator[pa.Table]:
    """The rows of one shard after the other, each in the order of their buckets and else as they were."""
    read, held = source.iter_batches(_ROWS, columns=schema.names), schema.empty_table()
    for count in rows:
        while held.num_rows < count:
            held = pa.concat_tables([held, pa.Table.from_batches([next(read).select(schema.names)]).cast(schema)])
        shard, held = held.slice(0, count), held.slice(count)
        sides = (shard[name].to_numpy() for name in ("width", "height"))
        place = np.lexsort(tuple(sides))
        yield shard if (np.diff(place) == 1).all() else shard.take(pa.array(place))


def _batches(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of `_ROWS` rows, however the tables are cut; only the last may be shorter."""
    held = schema.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while held.num_rows >= _ROWS:
            yield held.slice(0, _ROWS).combine_chunks().to_batches()[0]
            held = held.slice(_ROWS)
    if held.num_rows:
        yield held.combine_chunks().to_batches()[0]

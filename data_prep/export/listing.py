"""Reads the samples that a snapshot lists: image, one caption to train on, and all other fields of the index.

A snapshot may list a sample several times, by its source's weight; from the second time on its name gets a number, as
in `<key>-1`. The caption is drawn by the snapshot's weights from a hash of that name, so it is the same in every export
and each listing of a sample draws its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.sources import parquet
from infra.errors import DataError
from infra.records import ShardRecord, read_record
from infra.shards import read_index, shard_key, tar_number
from infra.store import Store

GAP = 64 << 10  # bytes between two images up to which one request for both is cheaper than two
SPAN = 8 << 20  # the most bytes of one request
BATCH = 1024  # rows that are in memory as Python objects
# Columns of an index about a sample's place in our shards and its hashes, which are of no use outside of the store.
_INTERNAL = {
    *("accepted", "row", "cause", "detail", "offset", "length", "json_offset", "json_length"),
    *("image_sha256", "pixels_sha256", "phash", "captions"),
}
_NAME = "name"  # the column of names, one for each listing

Weights = npt.NDArray[np.int64]


class Sample(NamedTuple):
    name: str
    text: str
    about: dict[str, Any]  # its key, licence and origin, all its captions with their weights, ...
    tar: str
    offset: int
    length: int
    sha256: bytes


class Listing:
    """One half of a snapshot's samples; `path` is a local copy of its selection."""

    def __init__(self, store: Store, plan: str, size: str, path: Path) -> None:
        self._store, self._plan, self._size, self._path = store, plan, size, path

    def parts(self, limit: int, weigh: Callable[[pa.Table], Weights]) -> Iterator[pa.Table]:
        """The rows in parts, each as large as it can be without weighing more than the limit."""
        waiting: list[pa.Table] = []
        used = 0
        for table in self._tables():
            ends = np.cumsum(weigh(table))
            start = 0
            while start < table.num_rows:
                before = int(ends[start - 1]) if start else 0
                stop = int(np.searchsorted(ends, before + limit - used, side="right"))
                if stop == start and not waiting:
                    stop += 1  # one row that weighs more than the limit is a part of its own
                if stop > start:
                    waiting.append(table.slice(start, stop - start))
                    used += int(ends[stop - 1]) - before
                if stop < table.num_rows:
                    yield pa.concat_tables(waiting)
                    waiting, used = [], 0
                start = stop
        if waiting:
            yield pa.concat_tables(waiting)

    def _tables(self) -> Iterator[pa.Table]:
        """The row groups with a name for each row; the listings of one sample are consecutive rows."""
        last, count = "", 0
        with parquet.opened(self._path.open("rb"), self._path.name) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                names = []
                for key in table["key"].to_pylist():
                    last, count = key, count + 1 if key == last else 0
                    names.append(f"{key}-{count}" if count else key)
                yield table.append_column(_NAME, pa.array(names, pa.string()))

    def described(self, part: pa.Table) -> Iterator[Sample]:
        """The samples of these rows, with the fields of their shards' indexes."""
        index: pa.Table = None
        index_of = ""
        for batch in part.to_batches(max_chunksize=BATCH):
            for tar, group in groupby(batch.to_pylist(), key=lambda row: str(row["tar"])):
                if tar != index_of:
                    index_of, index = tar, self._index(tar)
                rows = list(group)
                for row, fields in zip(rows, _at_offsets(index, [row["offset"] for row in rows]), strict=True):
                    if (fields["key"], fields["offset"]) != (row["key"], row["offset"]):
                        raise _inconsistent(tar, f"has no sample {row['key']} where the snapshot says")
                    yield _sample(row, fields)

    def read(self, part: pa.Table) -> Iterator[tuple[Sample, bytes]]:
        """The samples of these rows with their images, which are checked against their hashes."""
        for tar, samples in groupby(self.described(part), key=lambda sample: sample.tar):
            for span in _spans(samples):
                first = span[0].offset
                data = self._store.get(tar, first, span[-1].offset + span[-1].length)
                for sample in span:
                    image = data[sample.offset - first :][: sample.length]
                    if hashlib.sha256(image).digest() != sample.sha256:
                        raise _inconsistent(tar, f"is damaged: the image of {sample.name} is not what was prepared")
                    yield sample, image

    def _index(self, tar: str) -> pa.Table:
        """The accepted rows of a tar's index, in the order of their images."""
        record = read_record(self._store, shard_key(self._plan, self._size, tar_number(tar)), ShardRecord)
        if record.tar is None or record.tar.key != tar:
            raise _inconsistent(tar, "is not what its shard's record names")
        table = read_index(self._store, record)
        return table.filter(table["accepted"]).combine_chunks()


def _at_offsets(index: pa.Table, offsets: list[int]) -> list[dict[str, Any]]:
    """For each offset the row that has it, or some other row if none has."""
    positions = np.searchsorted(index["offset"].to_numpy(), offsets)
    rows: list[dict[str, Any]] = index.take(np.minimum(positions, index.num_rows - 1)).to_pylist()
    return rows


def _inconsistent(tar: str, what: str) -> DataError:
    return DataError(
        f"{tar} {what}",
        remedy="run `pixnerd data verify --drop-damaged`, then the recipe again; it mends the shard and its snapshots",
    )


def _sample(row: dict[str, Any], fields: dict[str, Any]) -> Sample:
    """A sample from its row of the selection and its row of the index."""
    texts, weights = row["captions"], [round(float(weight), 6) for weight in row["caption_weights"]]
    text = drawn(row[_NAME], texts, weights)
    about = {name: value for name, value in fields.items() if name not in _INTERNAL}
    about |= {"text": text, "captions": texts, "caption_weights": weights}
    return Sample(row[_NAME], text, about, row["tar"], row["offset"], row["length"], fields["image_sha256"])


def drawn(name: str, texts: Sequence[str], weights: Sequence[float]) -> str:
    """One of the captions, drawn with these weights by a hash of the name; labelled samples may have none."""
    if not texts:
        return ""
    fraction = int(hashlib.sha256(f"caption\0{name}".encode()).hexdigest()[:12], 16) / 16**12
    ends = np.cumsum(weights)
    return texts[min(int(np.searchsorted(ends, fraction * ends[-1], side="right")), len(texts) - 1)]


def _spans(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Consecutive samples whose images lie near each other in their tar, so that one request reads them."""
    span: list[Sample] = []
    for sample in samples:
        if span and not (
            0 <= sample.offset - span[-1].offset <= span[-1].length + GAP
            and sample.offset + sample.length - span[0].offset <= SPAN
        ):
            yield span
            span = []
        span.append(sample)
    if span:
        yield span

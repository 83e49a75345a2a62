"""What a snapshot lists, one sample after the other: its image, one caption to train on, and all that is known of it.

A snapshot lists a sample as often as its source weighs; from the second time on its name has a number. The caption is
drawn as the snapshot weighs them, by the name, so that it is the same in every export and another for each listing.
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
from infra.shards import read_index, shard_key
from infra.store import Store

GAP = 64 << 10  # bytes between two images that are read with them sooner than asked for apart
SPAN = 8 << 20  # bytes that are asked for at once
BATCH = 1024  # rows that are in memory as Python's own values
# Where a sample lies in our shards, and how it is told from others there: of no use outside.
_INSIDE = {
    *("accepted", "row", "cause", "detail", "offset", "length", "json_offset", "json_length"),
    *("image_sha256", "pixels_sha256", "phash", "captions"),
}
_NAMES = "name"

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
    """One half of a snapshot's samples; `path` is its selection, on this machine."""

    def __init__(self, store: Store, plan: str, size: str, path: Path) -> None:
        self._store, self._plan, self._size, self._path = store, plan, size, path

    def parts(self, limit: int, weigh: Callable[[pa.Table], Weights]) -> Iterator[pa.Table]:
        """The rows in pieces, each as large as it may be without weighing more than the limit."""
        waiting: list[pa.Table] = []
        used = 0
        for table in self._tables():
            ends = np.cumsum(weigh(table))
            start = 0
            while start < table.num_rows:
                before = int(ends[start - 1]) if start else 0
                stop = int(np.searchsorted(ends, before + limit - used, side="right"))
                if stop == start and not waiting:
                    stop += 1  # it is too large for any
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
        """With a name for every listing: those of a sample follow one another."""
        last, count = "", 0
        with parquet.opened(self._path.open("rb"), self._path.name) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                names = []
                for key in table["key"].to_pylist():
                    last, count = key, count + 1 if key == last else 0
                    names.append(f"{key}-{count}" if count else key)
                yield table.append_column(_NAMES, pa.array(names, pa.string()))

    def described(self, part: pa.Table) -> Iterator[Sample]:
        index: pa.Table = None
        of = ""
        for batch in part.to_batches(max_chunksize=BATCH):
            for tar, group in groupby(batch.to_pylist(), key=lambda row: str(row["tar"])):
                if tar != of:
                    of, index = tar, self._index(tar)
                rows = list(group)
                for row, known in zip(rows, _found(index, [row["offset"] for row in rows]), strict=True):
                    if (known["key"], known["offset"]) != (row["key"], row["offset"]):
                        raise _strange(tar, f"has no sample {row['key']} where the snapshot says")
                    yield _sample(row, known)

    def read(self, part: pa.Table) -> Iterator[tuple[Sample, bytes]]:
        """With the images, held against their hashes."""
        for tar, samples in groupby(self.described(part), key=lambda sample: sample.tar):
            for span in _spans(samples):
                first = span[0].offset
                data = self._store.get(tar, first, span[-1].offset + span[-1].length)
                for sample in span:
                    image = data[sample.offset - first :][: sample.length]
                    if hashlib.sha256(image).digest() != sample.sha256:
                        raise _strange(tar, f"is damaged: the image of {sample.name} is not what was prepared")
                    yield sample, image

    def _index(self, tar: str) -> pa.Table:
        """The rows of a tar, in the order of their images."""
        number = int(Path(tar).name.partition("-")[0])
        record = read_record(self._store, shard_key(self._plan, self._size, number), ShardRecord)
        if record.tar is None or record.tar.key != tar:
            raise _strange(tar, "is not what its shard's record names")
        table = read_index(self._store, record)
        return table.filter(table["accepted"]).combine_chunks()


def _found(index: pa.Table, offsets: list[int]) -> list[dict[str, Any]]:
    """For each offset the row that has it, or another one if none has."""
    places = np.searchsorted(index["offset"].to_numpy(), offsets)
    found: list[dict[str, Any]] = index.take(np.minimum(places, index.num_rows - 1)).to_pylist()
    return found


def _strange(tar: str, what: str) -> DataError:
    return DataError(
        f"{tar} {what}",
        remedy="run `pixnerd data verify --drop-damaged`, then the recipe again; it mends the shard and its snapshots",
    )


def _sample(row: dict[str, Any], known: dict[str, Any]) -> Sample:
    texts, weights = row["captions"], [round(float(weight), 6) for weight in row["caption_weights"]]
    text = drawn(row[_NAMES], texts, weights)
    about = {name: value for name, value in known.items() if name not in _INSIDE}
    about |= {"text": text, "captions": texts, "caption_weights": weights}
    return Sample(row[_NAMES], text, about, row["tar"], row["offset"], row["length"], known["image_sha256"])


def drawn(name: str, texts: Sequence[str], weights: Sequence[float]) -> str:
    """One of the captions, as they weigh."""
    luck = int(hashlib.sha256(f"caption\0{name}".encode()).hexdigest()[:12], 16) / 16**12
    ends = np.cumsum(weights)
    return texts[min(int(np.searchsorted(ends, luck * ends[-1], side="right")), len(texts) - 1)]


def _spans(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Samples whose images are read at once, as they lie near one another."""
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

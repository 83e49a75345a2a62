"""Listings of a folder's images, stored ones and the current one: sorted by name, and read in a stream."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from data_prep.sources import parquet
from data_prep.sources.base import Input
from data_prep.sources.folders import StoreFolder
from data_prep.sources.parquet import RowWriter
from infra import layout
from infra.records import put_data
from infra.store import Store

LISTING = "listing"  # the name of every such input; their hashes differ
LISTED = 1 << 16  # the most images of one listing


class Listed(NamedTuple):
    """A row of a listing: an image of the folder."""

    name: str
    size: int
    refused: str | None  # the cause for which it may not be read
    text: bytes | None  # a hash of the caption file, since an edited caption often has the same size
    label: int | None
    classes: str | None  # its class's names
    others: bytes | None = None  # a hash of the images that had been replaced by others of the same size, if any had


SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("refused", pa.string()),
        ("text", pa.binary()),
        ("label", pa.int32()),
        ("classes", pa.string()),
        ("others", pa.binary()),
    ]
)
STAMPED = SCHEMA.append(pa.field("stamp", pa.int64()))


class Whole:
    """The current listing of the folder with the files' stamps, in Parquet files in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._parts: list[Path] = []
        self._firsts: list[str] = []  # the first name in each part
        self._writer: RowWriter | None = None

    def add(self, row: Listed, stamp: int) -> None:
        if self._writer is None or self._writer.rows == LISTED:
            self.close()
            self._parts.append(self._scratch / f"{len(self._parts)}.parquet")
            self._firsts.append(row.name)
            self._writer = RowWriter(self._parts[-1], STAMPED)
        self._writer.add([*row, stamp])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def rows(self, start: str = "") -> Iterator[tuple[Listed, int]]:
        """The rows from this name on; some with smaller names may come before them."""
        for path in self._parts[max(0, bisect_left(self._firsts, start) - 1) :]:
            for *row, stamp in _rows(path.open("rb"), str(path), STAMPED):
                yield Listed(*row), stamp


class Stored:
    """A listing of an earlier plan. Its identity and its first and last names are known once it was read to the end."""

    def __init__(self, store: Store, key: str) -> None:
        self.key, self._store = key, store
        self.first = self.last = ""
        self._identity = _Identity()

    def __iter__(self) -> Iterator[Listed]:
        identity, row = _Identity(), None
        for values in _rows(StoreFolder(self._store).open(self.key), self.key, SCHEMA):
            row = Listed(*values)
            self.first = row.name if not identity.rows else self.first
            identity.add(row)
            yield row
        self.last, self._identity = row.name if row else "", identity

    def input(self) -> Input:
        return self._identity.input(self.key)

    def meets(self, others: Iterable[Stored]) -> bool:
        """Whether an image is in this listing twice, or in it and in one of the others."""
        near = [other for other in others if other.first <= self.last and self.first <= other.last]
        return any(row.name == following.name for row, following in pairwise(merged([self, *near])))


def merged(listings: Iterable[Stored]) -> Iterator[Listed]:
    """All rows in order of name. A listing is opened only when its first name is reached, as there may be many."""
    waiting = deque(sorted(listings, key=lambda listing: listing.first))
    order = count()
    heap: list[tuple[str, int, Listed, Iterator[Listed]]] = []

    def push(rows: Iterator[Listed]) -> None:
        for row in islice(rows, 1):
            heappush(heap, (row.name, next(order), row, rows))

    while waiting or heap:
        while waiting and (not heap or waiting[0].first <= heap[0][0]):
            push(iter(waiting.popleft()))
        if heap:
            _, _, row, rows = heappop(heap)
            yield row
            push(rows)


def put(source: str, store: Store | None, scratch: Path, rows: Iterator[Listed]) -> Iterator[Input]:
    """Store the rows as listings of at most LISTED rows; without any rows, give one empty input."""
    for number in count():
        with RowWriter(path := scratch / "listing.parquet", SCHEMA) as writer:
            identity = _Identity()
            for row in islice(rows, LISTED):
                writer.add(row)
                identity.add(row)
        if identity.rows or not number:
            stored = put_data(store, layout.TABLES.at(), f"{source}.parquet", path) if store and identity.rows else None
            yield identity.input(stored.key if stored else "")
        if identity.rows < LISTED:
            return


class _Identity:
    """The identity of a listing: a hash of its rows, and not of the Parquet file, whose bytes depend on its writer."""

    def __init__(self) -> None:
        self.rows = 0
        self._sha256 = hashlib.sha256()

    def add(self, row: Listed) -> None:
        self.rows += 1
        values = row if row.others else row[:-1]  # the hash stays what it was before this column existed
        self._sha256.update("\0".join(map(str, values)).encode() + b"\n")

    def input(self, table: str) -> Input:
        return Input(LISTING, self.rows, self._sha256.hexdigest(), table)


def _rows(file: BinaryIO, name: str, schema: pa.Schema) -> Iterator[Sequence[Any]]:
    with parquet.opened(file, name) as listing:
        stored = listing.schema_arrow.names  # an earlier version wrote fewer columns
        names = [column for column in schema.names if column in stored]
        for batch in listing.iter_batches(parquet.BATCH, columns=names, use_threads=False):
            yield from zip(*(batch.column(column).to_pylist() for column in names), strict=True)

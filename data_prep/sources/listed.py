"""Listings of folders, as they are stored and as they are now: sorted by name, and never in memory as a whole."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count, islice
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

LISTING = "listing"  # the name of these inputs: what is in them tells them apart
LISTED = 1 << 16  # images of a listing


class Listed(NamedTuple):
    """An image of the folder."""

    name: str
    size: int
    refused: str | None  # the cause for which it may not be read
    text: bytes | None  # a hash of the words beside it: others of the same length are easily written
    label: int | None
    classes: str | None  # its class's names
    others: bytes | None = None  # of a listing made since images were replaced by others of their sizes: a hash of them


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
    """All that the folder holds now, with stamps, on disk."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._parts: list[Path] = []
        self._firsts: list[str] = []  # the first name in each part
        self._writer: RowWriter | None = None

    def add(self, row: Listed, stamp: int) -> None:
        if self._writer is None or self._writer.rows == LISTED:
            self.close()
            self._parts.append(self._place / f"{len(self._parts)}.parquet")
            self._firsts.append(row.name)
            self._writer = RowWriter(self._parts[-1], STAMPED)
        self._writer.add([*row, stamp])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def rows(self, start: str = "") -> Iterator[tuple[Listed, int]]:
        """Those from this name on, after some before it."""
        for path in self._parts[max(0, bisect_left(self._firsts, start) - 1) :]:
            for *row, stamp in _rows(path.open("rb"), str(path), STAMPED):
                yield Listed(*row), stamp


class Stored:
    """A listing that was planned; what it is and which names it goes from and to is known once it was read through."""

    def __init__(self, store: Store, key: str) -> None:
        self.key, self._store = key, store
        self.first = self.last = ""
        self._identity = _Identity()

    def __iter__(self) -> Iterator[Listed]:
        identity, last = _Identity(), ""
        for values in _rows(StoreFolder(self._store).open(self.key), self.key, SCHEMA):
            row = Listed(*values)
            self.first = row.name if not identity.rows else self.first
            identity.add(row)
            last = row.name
            yield row
        self.last, self._identity = last, identity

    def input(self) -> Input:
        return self._identity.input(self.key)

    def meets(self, others: Iterable[Stored]) -> bool:
        """Whether an image stands in two of them, or twice in this one."""
        near = [other for other in others if other.first <= self.last and self.first <= other.last]
        last = None
        for row in merged([self, *near]):
            if row.name == last:
                return True
            last = row.name
        return False


def merged(listings: Iterable[Stored]) -> Iterator[Listed]:
    """All rows in order. A listing is opened where its names begin, as there may be many."""
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


def put(source: str, store: Store | None, place: Path, rows: Iterator[Listed]) -> Iterator[Input]:
    """The rows in listings of their own; one without rows where there is none."""
    for number in count():
        with RowWriter(path := place / "listing.parquet", SCHEMA) as writer:
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
    """What a listing is, whoever wrote it to what file."""

    def __init__(self) -> None:
        self.rows = 0
        self._sha256 = hashlib.sha256()

    def add(self, row: Listed) -> None:
        self.rows += 1
        told = row if row.others else row[:-1]  # as it was told when there was no such column
        self._sha256.update("\0".join(map(str, told)).encode() + b"\n")

    def input(self, table: str) -> Input:
        return Input(LISTING, self.rows, self._sha256.hexdigest(), table)


def _rows(file: BinaryIO, name: str, schema: pa.Schema) -> Iterator[Sequence[Any]]:
    with parquet.opened(file, name) as listing:
        there = listing.schema_arrow.names  # one of an earlier version has fewer columns
        names = [column for column in schema.names if column in there]
        for batch in listing.iter_batches(parquet.BATCH, columns=names, use_threads=False):
            yield from zip(*(batch.column(column).to_pylist() for column in names), strict=True)

"""Reading many objects concurrently, and a column of a large table, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import pyarrow as pa

from data_prep.sources import parquet
from data_prep.sources.folders import StoreFolder
from infra.records import DataObject
from infra.store import Store

T = TypeVar("T")
R = TypeVar("R")

READERS = 8  # threads: they wait for the store, or decode tables without holding the GIL


def in_order(
    work: Callable[[T], R], items: Iterable[T], threads: int = READERS, most: int | None = None
) -> Iterator[R]:
    """The result of `work` on each item, in the order of the items; at most `most` are made ahead, or two a thread."""
    with ThreadPoolExecutor(threads, thread_name_prefix="in-order") as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > (most or 2 * threads):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def column(store: Store, table: DataObject, name: str) -> Iterator[pa.ChunkedArray]:
    """One column of a table in the store, by row groups."""
    with parquet.opened(StoreFolder(store).open(table.key), table.key) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[name])[name]


def tars_in(store: Store, selection: DataObject) -> Iterator[str]:
    """The keys of the tars that hold a selection's images; one may come several times."""
    for part in column(store, selection, "tar"):
        yield from part.unique().to_pylist()

"""The raw items of a list of URLs, with the bytes that were downloaded for them.

The originals of a list lie side by side in tars if its rows are in the order in which they were asked for. Those of a
list that was filtered, joined or reordered since are scattered over many tars. So a tar of which many images are needed
is copied as a whole, with one request for hundreds of them, and others are read image by image.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_prep.prepare import links, originals
from data_prep.prepare.links import LinksRecord, Slice
from data_prep.prepare.originals import BatchRecord, Limits, Row, url_hash
from data_prep.rejections import Cause, Rejection
from data_prep.sources import Range, RawItem, Rows, Url, UrlSource
from data_prep.sources.reading import in_order
from data_prep.web.fetch import FetchSettings
from infra.errors import DataError, NotFound
from infra.records import DataObject, fetch_data
from infra.store import FileStore, Store

WINDOW = 2048  # rows for which it is decided together which tars are copied
MANY = 256  # a tar is copied if so many rows of a window need it
OPEN_FILES = 16
AHEAD = 2  # images that are requested at once; twice as many are in memory, and each may be large


class Linked(NamedTuple):
    """Where the originals of a shard's rows are."""

    links: LinksRecord
    attempts: Mapping[str, int]  # the newest download of each batch that was downloaded more than once


class Original(NamedTuple):
    url: str
    record: BatchRecord
    row: Row


def items(store: Store, source: UrlSource, settings: FetchSettings, linked: Linked, part: Range) -> Iterator[RawItem]:
    """The item of every row of the part, in order."""
    assert isinstance(part, Rows)
    with links.opened(store, linked.links) as file:
        links_of_part = file.slice(part.first, part.rows)
    with closing(_Tars(store)) as tars:
        images = _images(store, Limits(settings, source.max_bytes), linked, links_of_part, tars)
        for item, image in zip(source.items(store, part), images, strict=True):
            yield item._replace(image=_outcome(item, image, part))


Image = tuple[str, bytes | Rejection]  # the URL that was asked for, and what came of it


def _outcome(item: RawItem, downloaded: Image | None, part: Range) -> bytes | Rejection:
    """The image of an item, or why it has none.

    If both its download and its caption failed, the download is the cause: only that may pass in a retry.
    """
    if downloaded is None:
        if not isinstance(item.image, Rejection):
            raise links.changed(part.input)
        return item.image
    url, image = downloaded
    if isinstance(item.image, Rejection):
        return image if isinstance(image, Rejection) else item.image
    if item.image == url:
        return image
    if not isinstance(item.image, Url) or url_hash(item.image) != url_hash(url):
        raise links.changed(part.input)
    return Rejection(Cause.BAD_URL, "its hash is that of another one")


def _images(store: Store, limits: Limits, linked: Linked, part: Slice, tars: _Tars) -> Iterator[Image | None]:
    """What came of the URL of each row, in order; None for what is no URL."""
    for first in range(0, len(part.codes), WINDOW):
        window = part._replace(codes=part.codes[first : first + WINDOW], at=part.at[first : first + WINDOW])
        rows: list[Original | Image | None] = []
        for original in _originals(store, window, linked.attempts):
            refusal = original and limits.refused(original.row)
            rows.append((original.url, refusal) if original and refusal else original)
        yield from tars.images(rows)


def _originals(store: Store, window: Slice, attempts: Mapping[str, int]) -> list[Original | None]:
    """Each row's entry in the index of its batch, in order; None for what is no URL."""
    originals_of_rows: list[Original | None] = [None] * len(window.codes)

    def read(number: int) -> tuple[int, BatchRecord, list[Row]]:
        name = window.names[number]
        record = originals.read_batch(store, name, attempts.get(name, 0))
        return number, record, originals.read_index(store, record).take(window.at[window.codes == number]).to_pylist()

    used = np.unique(window.codes[window.codes >= 0]).tolist()
    for number, record, rows in in_order(read, used):
        for place, row in zip(np.flatnonzero(window.codes == number).tolist(), rows, strict=True):
            originals_of_rows[place] = Original(row["url"], record, row)
    return originals_of_rows


class _Tars:
    """The tars of originals. Those of a local store are read in place, others from a copy or by range requests.

    A copy is an open file without a name, so that it goes when this process ends.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._left: Counter[str] = Counter()  # how many images of each copied tar are still needed
        self._lock = threading.Lock()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def images(self, window: list[Original | Image | None]) -> Iterator[Image | None]:
        """The bytes of each row that is an `Original`, in order; the other rows as they are."""
        wanted = [row for row in window if isinstance(row, Original)]
        if isinstance(self._store, FileStore):
            yield from map(self._image, window)
            return
        last = _tar(wanted[-1]).key if wanted else ""
        counts = Counter(_tar(row).key for row in wanted)
        self._left = Counter({key: count for key, count in counts.items() if count >= MANY})
        for key in self._files.keys() - self._left.keys():
            self._files.pop(key).close()
        for row, image in zip(window, in_order(self._image, window, AHEAD), strict=True):
            yield image
            if isinstance(row, Original) and (key := _tar(row).key) in self._left:
                self._left[key] -= 1
                if not self._left[key] and key != last:  # the next window may go on with the last one
                    self._files.pop(key).close()

    def _image(self, row: Original | Image | None) -> Image | None:
        if not isinstance(row, Original):
            return row
        tar, start, length = _tar(row), row.row["offset"], row.row["length"]
        try:
            file = self._file(tar)
            data = os.pread(file.fileno(), length, start) if file else self._store.get(tar.key, start, start + length)
        except NotFound:
            raise originals.gone(self._store, row.record) from None
        checked = file is not None and not isinstance(self._store, FileStore)  # a copy was checked as a whole
        if not checked and hashlib.sha256(data).digest() != row.row["sha256"]:
            raise DataError(
                f"{self._store.url}/{tar.key} is damaged: {row.url} is not what was downloaded",
                remedy="delete it, then run again: what it holds is downloaded once more",
            )
        return row.url, data

    def _file(self, tar: DataObject) -> BinaryIO | None:
        """The open tar; None if its images are requested one by one."""
        with self._lock:
            if tar.key in self._files:
                self._files.move_to_end(tar.key)
                return self._files[tar.key]
            local = isinstance(self._store, FileStore)
            if not local and tar.key not in self._left:
                return None
            while local and len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[tar.key] = self._opened(tar)
            return self._files[tar.key]

    def _opened(self, tar: DataObject) -> BinaryIO:
        if isinstance(self._store, FileStore):
            return self._store.opened(tar.key)
        with tempfile.TemporaryDirectory(prefix="pixnerd-originals-") as folder:
            path = Path(folder, "tar")
            fetch_data(self._store, tar, path)
            return path.open("rb")


def _tar(row: Original) -> DataObject:
    assert row.record.tar is not None, "what has bytes has a tar"
    return row.record.tar

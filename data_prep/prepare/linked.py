"""The raw items of a list of URLs, with the bytes that were downloaded for them, from wherever these lie.

A list whose rows stand in the order in which they were asked for finds its originals side by side. What is left of one
that was filtered, joined with others or put in another order finds them scattered over many tars. So it depends on how
much of a tar is wanted whether it is copied as a whole, one request for hundreds of images, or read image by image.
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

WINDOW = 2048  # rows that are looked at together
MANY = 256  # rows of a window for which a tar is worth a copy
OPEN_FILES = 16
AHEAD = 2  # images that a store is asked for at once, and twice as many are held: each may be large


class Linked(NamedTuple):
    """What the originals of a shard's rows are told by."""

    links: LinksRecord
    attempts: Mapping[str, int]  # of batches that were downloaded more than once: which time counts


class Original(NamedTuple):
    url: str
    record: BatchRecord
    row: Row


def items(store: Store, source: UrlSource, settings: FetchSettings, linked: Linked, part: Range) -> Iterator[RawItem]:
    """Every row of the part, in order."""
    assert isinstance(part, Rows)
    with links.opened(store, linked.links) as file:
        here = file.slice(part.first, part.rows)
    with closing(_Tars(store)) as tars:
        found = _images(store, Limits(settings, source.max_bytes), linked, here, tars)
        for item, image in zip(source.items(store, part), found, strict=True):
            yield item._replace(image=_outcome(item, image, part))


Image = tuple[str, bytes | Rejection]  # with the URL that was asked for it


def _outcome(item: RawItem, found: Image | None, part: Range) -> bytes | Rejection:
    """A failed download comes before what is wrong with a caption: it alone may pass."""
    if found is None:
        if not isinstance(item.image, Rejection):
            raise links.changed(part.input)
        return item.image
    url, image = found
    if isinstance(item.image, Rejection):
        return image if isinstance(image, Rejection) else item.image
    if item.image == url:
        return image
    if not isinstance(item.image, Url) or url_hash(item.image) != url_hash(url):
        raise links.changed(part.input)
    return Rejection(Cause.BAD_URL, "its hash is that of another one")


def _images(store: Store, limits: Limits, linked: Linked, here: Slice, tars: _Tars) -> Iterator[Image | None]:
    for first in range(0, len(here.codes), WINDOW):
        window = here._replace(codes=here.codes[first : first + WINDOW], at=here.at[first : first + WINDOW])
        rows = _rows(store, window, linked.attempts)
        taken: list[Original | Image | None] = []
        for row in rows:
            why = row and limits.refused(row.row)
            taken.append((row.url, why) if row and why else row)
        yield from tars.images(taken)


def _rows(store: Store, here: Slice, attempts: Mapping[str, int]) -> list[Original | None]:
    """What is known of each row's original, in order."""
    found: list[Original | None] = [None] * len(here.codes)

    def read(number: int) -> tuple[int, BatchRecord, list[Row]]:
        name = here.names[number]
        record = originals.read_batch(store, name, attempts.get(name, 0))
        return number, record, originals.read_index(store, record).take(here.at[here.codes == number]).to_pylist()

    used = np.unique(here.codes[here.codes >= 0]).tolist()
    for number, record, rows in in_order(read, used):
        for place, row in zip(np.flatnonzero(here.codes == number).tolist(), rows, strict=True):
            found[place] = Original(row["url"], record, row)
    return found


class _Tars:
    """Tars to read from. Those on this machine are read where they lie, others from a copy or by ranges.

    A copy is open and has no name, so that it is gone with this process.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._left: Counter[str] = Counter()  # what is still wanted of the tars that are copied
        self._lock = threading.Lock()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def images(self, window: list[Original | Image | None]) -> Iterator[Image | None]:
        """The bytes of each row that is not settled, in order."""
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
            if file is not None and not isinstance(self._store, FileStore):
                return row.url, os.pread(file.fileno(), length, start)  # the copy has been held against its hash
            data = os.pread(file.fileno(), length, start) if file else self._store.get(tar.key, start, start + length)
        except NotFound:
            raise originals.gone(self._store, row.record) from None
        if hashlib.sha256(data).digest() != row.row["sha256"]:
            raise DataError(
                f"{self._store.url}/{tar.key} is damaged: {row.url} is not what was downloaded",
                remedy="delete it, then run again: what it holds is downloaded once more",
            )
        return row.url, data

    def _file(self, tar: DataObject) -> BinaryIO | None:
        """The open tar; none where its images are asked for one by one."""
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

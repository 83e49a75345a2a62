"""Corpora without tables: every image of a folder, with a caption from a text file beside it or from its class's name.

The folder's listing takes the place of a table. It is stored as Parquet, sorted by name, in parts of LISTED images, so
that planning and tasks use the same rows. When the folder has grown, the planned listings stay, and the new images get
listings of their own. When an image was removed or changed, also to another of the same size (see `checksums`), the
listing that has it is dropped and its images are listed anew.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data_prep.rejections import Cause, Rejection
from data_prep.sources import checksums, parquet, words
from data_prep.sources.base import IMAGE_SUFFIXES, Input, Range, RawItem, Rows, Source
from data_prep.sources.folders import File, Folder, open_folder, text_of
from data_prep.sources.listed import Listed, Stored, Whole, merged, put
from infra.config import digest
from infra.shards import sample_key
from infra.store import Store

BATCH = 4096  # files whose sizes and stamps are compared at once

_log = logging.getLogger(__name__)


class Listings(Source):
    @abstractmethod
    def listed(self, folder: Folder) -> Iterator[tuple[Listed, int]]:
        """The folder's images with their stamps, sorted by name."""

    @abstractmethod
    def captions_of(self, folder: Folder, row: Listed) -> list[dict[str, str]] | Rejection:
        """An image's captions, or why it is refused for them."""

    def kept_of(self, row: Listed) -> dict[str, Any]:
        """The image's values of the columns that this source adds to the index."""
        return {}

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        """The planned listings whose rows are all unchanged, and new listings of everything else."""
        folder = open_folder(self.url)
        with TemporaryDirectory() as scratch:
            whole = Whole(Path(scratch))
            for row, stamp in self.listed(folder):
                whole.add(row, stamp)
            whole.close()
            unchanged, others = _unchanged(self, folder, whole, store, planned) if store else ([], None)
            known = [listing.input() for listing in unchanged]
            fresh = (row._replace(others=others) for row in _without(whole, unchanged))
            added = list(put(self.name, store, Path(scratch), fresh))
            return [*known, *(entry for entry in added if entry.size or not known)]

    def ranges(self, store: Store, entry: Input, rows: int) -> Iterator[Range]:
        assert entry.table or not entry.size, "inputs() was not given the store"
        for first in range(0, entry.size, rows):
            yield Rows(entry.name, entry.table, True, first, min(rows, entry.size - first))

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Rows)
        folder, files = open_folder(self.url), checksums.Recorder(store, _corpus_id(part.table), part)
        for number, row in parquet.rows(self, store, part, ["name", "size", "refused", "label", "classes"]):
            assert not isinstance(row, Rejection), "listings are written here"
            name, refused, classes = (words.text(row[column]) for column in ("name", "refused", "classes"))
            listed = Listed(name or "", row["size"], refused, None, row["label"], classes)
            yield self._item(folder, files, number, listed)
        files.write()

    def _item(self, folder: Folder, files: checksums.Recorder, number: int, row: Listed) -> RawItem:
        captions = Rejection(Cause(row.refused)) if row.refused else self.captions_of(folder, row)
        refusal, texts = words.image_and_captions(None, captions)
        image = refusal or files.read(folder, number, row.name, self.max_bytes)
        # The stored form of a name that is not UTF-8 may be equal to another file's name.
        key = sample_key(self.name, f"\0{row.name}" if row.refused == Cause.BAD_NAME else row.name)
        kept = self.kept_of(row)
        return RawItem(number, key, words.shown(row.name), image, texts, self.licence, self.origin, kept)


def images(folder: Folder) -> Iterator[File]:
    """The images, and the folders that are not entered: each is one refused item, since its images are not known."""
    for file in folder.names():
        if file.name.endswith("/") or PurePosixPath(file.name).suffix.lower() in IMAGE_SUFFIXES:
            text, name = text_of(file.name).rstrip("/"), file.name.rstrip("/")
            yield file._replace(name=text, refused=file.refused or (Cause.BAD_NAME if text != name else None))


def _without(whole: Whole, planned: Sequence[Stored]) -> Iterator[Listed]:
    """The rows that are in no planned listing."""
    listed = merged(planned)
    known = next(listed, None)
    for row, _ in whole.rows():
        if known is not None and row == known._replace(others=None):
            known = next(listed, None)
        else:
            yield row


def _unchanged(
    source: Listings, folder: Folder, whole: Whole, store: Store, planned: Sequence[Range]
) -> tuple[list[Stored], bytes | None]:
    """The listings that are still right, and a hash of the images that replaced others in the rest of them.

    The newest listings are checked first: one that was made when images had been replaced repeats rows of older ones.
    """
    kept: list[Stored] = []
    sha256, others = hashlib.sha256(), 0
    for key in reversed(dict.fromkeys(part.table for part in planned)):
        listing = Stored(store, key)
        if not all(stamp is not None for _, stamp in _with_stamps(listing, whole)) or listing.meets(kept):
            continue
        before, files = others, partial(_files, listing, whole)
        for row, content in checksums.replaced(store, _corpus_id(key), folder, source.max_bytes, files):
            sha256.update(b"%s %d %s\n" % (key.encode(), row, content))
            others += 1
        if others == before:
            kept.insert(0, listing)
    if others:
        _log.warning("%d images of the source `%s` were replaced by others of their sizes", others, source.name)
    return kept, sha256.digest()[:16] if others else None


def _with_stamps(listing: Stored, whole: Whole) -> Iterator[tuple[Listed, int | None]]:
    """A listing's rows with their files' current stamps, up to the first row whose file is gone or changed: None."""
    rows: Iterator[tuple[Listed, int]] | None = None
    for row in listing:
        rows = rows or whole.rows(row.name)
        for current, stamp in rows:  # both are sorted, so one pass is enough
            if current == row._replace(others=None):
                yield row, stamp
                break
        else:
            yield row, None
            return


def _files(listing: Stored, whole: Whole) -> Iterator[checksums.Files]:
    rows = _with_stamps(listing, whole)
    while batch := list(islice(rows, BATCH)):
        sizes, stamps = [row.size for row, _ in batch], [stamp or 0 for _, stamp in batch]
        yield checksums.Files([row.name for row, _ in batch], np.array(sizes, np.int64), np.array(stamps, np.int64))


def _corpus_id(table: str) -> str:
    return digest(("listing", table))

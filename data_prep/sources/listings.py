"""Corpora that are their folder: every image in it, with a caption from a text beside it or from its class's name.

The folder's listing is their table, in parts of LISTED images. It is stored as Parquet, sorted by name, so that
everybody plans and works by the same one. When the folder has grown, what was planned stays as it is, and the images
that came are a listing of their own. An image that goes, or changes, costs the part that it is in: also one that was
replaced by another of the same size (`looked`).
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
from data_prep.sources import looked, parquet, words
from data_prep.sources.base import IMAGE_SUFFIXES, Input, Range, RawItem, Rows, Source
from data_prep.sources.folders import File, Folder, open_folder, text_of
from data_prep.sources.listed import Listed, Stored, Whole, merged, put
from infra.shards import sample_key
from infra.store import Store

BATCH = 4096  # files whose stamps are compared at once

_log = logging.getLogger(__name__)


class Listings(Source):
    @abstractmethod
    def listed(self, folder: Folder) -> Iterator[tuple[Listed, int]]:
        """The folder's pictures with their stamps, sorted by name, whatever order the folder gives them in."""

    @abstractmethod
    def captions_of(self, folder: Folder, row: Listed) -> list[dict[str, str]] | Rejection: ...

    def kept_of(self, row: Listed) -> dict[str, Any]:
        return {}

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        """The listings that were planned, as far as all of their rows are still there, and those of everything else."""
        folder = open_folder(self.url)
        with TemporaryDirectory() as place:
            whole = Whole(Path(place))
            for row, stamp in self.listed(folder):
                whole.add(row, stamp)
            whole.close()
            before, others = _still_there(self, folder, whole, store, planned) if store else ([], None)
            found = [listing.input() for listing in before]
            fresh = (row._replace(others=others) for row in _without(whole, before))
            made = list(put(self.name, store, Path(place), fresh))
            return [*found, *(new for new in made if new.size or not found)]

    def ranges(self, store: Store, found: Input, rows: int) -> Iterator[Range]:
        assert found.table or not found.size, "inputs() was not given the store"
        for first in range(0, found.size, rows):
            yield Rows(found.name, found.table, True, first, min(rows, found.size - first))

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Rows)
        folder, looks = open_folder(self.url), looked.Looks(store, _place(part.table), part)
        for number, row in parquet.rows(self, store, part, ["name", "size", "refused", "label", "classes"]):
            assert not isinstance(row, Rejection), "a listing is our own"
            name, refused, classes = (words.text(row[column]) for column in ("name", "refused", "classes"))
            listed = Listed(name or "", row["size"], refused, None, row["label"], classes)
            yield self._item(folder, looks, number, listed)
        looks.put()

    def _item(self, folder: Folder, looks: looked.Looks, number: int, row: Listed) -> RawItem:
        image: bytes | Rejection
        captions: list[dict[str, str]] = []
        found = Rejection(Cause(row.refused)) if row.refused else self.captions_of(folder, row)
        if isinstance(found, Rejection):
            image = found
        else:
            image, captions = looks.read(folder, number, row.name, self.max_bytes), found
        # A name that is no text could be written out like another's.
        key = sample_key(self.name, f"\0{row.name}" if row.refused == Cause.BAD_NAME else row.name)
        kept = self.kept_of(row)
        return RawItem(number, key, words.shown(row.name), image, captions, self.licence, self.origin, kept)


def images(folder: Folder) -> Iterator[File]:
    """The pictures; and the folders that are not entered, whose pictures nobody has counted."""
    for file in folder.names():
        if file.name.endswith("/") or PurePosixPath(file.name).suffix.lower() in IMAGE_SUFFIXES:
            text, name = text_of(file.name).rstrip("/"), file.name.rstrip("/")
            yield file._replace(name=text, refused=file.refused or (Cause.BAD_NAME if text != name else None))


def _without(whole: Whole, planned: Sequence[Stored]) -> Iterator[Listed]:
    """The rows that no listing has."""
    listed = merged(planned)
    known = next(listed, None)
    for row, _ in whole.rows():
        if known is not None and row == known._replace(others=None):
            known = next(listed, None)
        else:
            yield row


def _still_there(
    source: Listings, folder: Folder, whole: Whole, store: Store, planned: Sequence[Range]
) -> tuple[list[Stored], bytes | None]:
    """The listings that hold, and a hash of what has replaced images of the others.

    The newest come first: one that replaced others has their rows as well.
    """
    kept: list[Stored] = []
    sha256, others = hashlib.sha256(), 0
    for key in reversed(dict.fromkeys(part.table for part in planned)):
        listing = Stored(store, key)
        if not all(stamp is not None for _, stamp in _found(listing, whole)) or listing.meets(kept):
            continue
        before, files = others, partial(_files, listing, whole)
        for row, content in looked.replaced(store, _place(key), folder, source.max_bytes, files):
            sha256.update(b"%s %d %s\n" % (key.encode(), row, content))
            others += 1
        if others == before:
            kept.insert(0, listing)
    if others:
        _log.warning("%d images of the source `%s` were replaced by others of their sizes", others, source.name)
    return kept, sha256.digest()[:16] if others else None


def _found(listing: Stored, whole: Whole) -> Iterator[tuple[Listed, int | None]]:
    """A listing's rows with the stamps that their files have now; None for the first that is not there, and the end."""
    rows: Iterator[tuple[Listed, int]] | None = None
    for row in listing:
        rows = rows or whole.rows(row.name)
        for here, stamp in rows:  # both are sorted, so it is searched but once
            if here == row._replace(others=None):
                yield row, stamp
                break
        else:
            yield row, None
            return


def _files(listing: Stored, whole: Whole) -> Iterator[looked.Files]:
    found = _found(listing, whole)
    while batch := list(islice(found, BATCH)):
        sizes, stamps = [row.size for row, _ in batch], [stamp or 0 for _, stamp in batch]
        yield looked.Files([row.name for row, _ in batch], np.array(sizes, np.int64), np.array(stamps, np.int64))


def _place(table: str) -> str:
    return looked.place("listing", table)

"""The images that a table's rows name: which of them are there, and whether they are what they were.

A folder's files are held as columns, by hash of the name: 24 bytes a file, however long its name is.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_prep.sources import looked, words
from data_prep.sources.base import Input
from data_prep.sources.folders import Folder, fingerprint
from infra.store import Store

Names = Sequence[bytes | None]
Seen = tuple[Store, str] | None  # the store and the place of what was seen; without one nobody is asked
_log = logging.getLogger(__name__)


class Sizes:
    """A folder's files, with their sizes and stamps."""

    def __init__(self, folder: Folder) -> None:
        hashes, sizes, stamps = array("Q"), array("q"), array("q")
        for file in folder.names():
            hashes.append(_hash(file.name.encode(errors="surrogateescape")))
            sizes.append(file.size)
            stamps.append(file.stamp)
        found = np.frombuffer(hashes, np.uint64)
        order = np.argsort(found, kind="stable")
        self._hashes = found[order]
        self._sizes, self._stamps = (np.frombuffer(column, np.int64)[order] for column in (sizes, stamps))

    def of(self, names: Names) -> tuple[looked.Column, looked.Column]:
        """The size and stamp of each, -1 and 0 where there is no such file."""
        if not len(self._hashes):
            return np.full(len(names), -1, np.int64), np.zeros(len(names), np.int64)
        wanted = np.array([_hash(_normal(name or b"")) for name in names], np.uint64)
        near = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        is_there = self._hashes[near] == wanted
        return np.where(is_there, self._sizes[near], -1), np.where(is_there, self._stamps[near], 0)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _normal(name: bytes) -> bytes:
    return posixpath.normpath(name) if b"./" in name or b"//" in name else name


def place(source: str, folder: Folder, table: str) -> str:
    """Where what tasks saw of a table's images lies."""
    return looked.place("table", source, table, fingerprint(folder, table))


def with_images(
    table: Input, names: Callable[[], Iterator[Names]], sizes: Sizes, folder: Folder, limit: int, seen: Seen
) -> Input:
    """The table with the sizes of its rows' images as a part of its identity, and with what has replaced them."""

    def rows() -> Iterator[looked.Files]:
        for here in names():
            yield looked.Files([words.text(name) for name in here], *sizes.of(here))

    sha256 = hashlib.sha256(bytes.fromhex(table.sha256))
    for files in rows():
        sha256.update(files.sizes.astype("<i8").tobytes())
    others = 0
    if seen is not None:
        for row, content in looked.replaced(*seen, folder, limit, rows):
            sha256.update(b"%d %s\n" % (row, content))
            others += 1
    if others:
        _log.warning("%d images that %s names were replaced by others of their sizes", others, table.name)
    return table._replace(sha256=sha256.hexdigest())

"""The identity of a table whose rows name images of a folder: it covers the images' sizes and later replacements.

A folder's files are held as columns, sorted by a hash of the name: 24 bytes a file, however long its name is.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_prep.sources import checksums, words
from data_prep.sources.base import Input
from data_prep.sources.folders import Folder, fingerprint
from infra.config import digest
from infra.store import Store

Names = Sequence[bytes | None]
Recorded = tuple[Store, str] | None  # the store and the corpus id of recorded checksums; None: they are not compared
_log = logging.getLogger(__name__)


class Sizes:
    """A folder's files, with their sizes and stamps."""

    def __init__(self, folder: Folder) -> None:
        hashes, sizes, stamps = array("Q"), array("q"), array("q")
        for file in folder.names():
            hashes.append(_hash(file.name.encode(errors="surrogateescape")))
            sizes.append(file.size)
            stamps.append(file.stamp)
        unsorted = np.frombuffer(hashes, np.uint64)
        order = np.argsort(unsorted, kind="stable")
        self._hashes = unsorted[order]
        self._sizes, self._stamps = (np.frombuffer(column, np.int64)[order] for column in (sizes, stamps))

    def of(self, names: Names) -> tuple[checksums.Column, checksums.Column]:
        """The size and stamp of each, -1 and 0 where there is no such file."""
        if not len(self._hashes):
            return np.full(len(names), -1, np.int64), np.zeros(len(names), np.int64)
        wanted = np.array([_hash(_normal(name or b"")) for name in names], np.uint64)
        near = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        exists = self._hashes[near] == wanted
        return np.where(exists, self._sizes[near], -1), np.where(exists, self._stamps[near], 0)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _normal(name: bytes) -> bytes:
    return posixpath.normpath(name) if b"./" in name or b"//" in name else name


def corpus_id(source: str, folder: Folder, table: str) -> str:
    """The id under which the checksums of a table's images are recorded."""
    return digest(("table", source, table, fingerprint(folder, table)))


def with_images(
    table: Input, names: Callable[[], Iterator[Names]], sizes: Sizes, folder: Folder, limit: int, recorded: Recorded
) -> Input:
    """The table with an identity that covers the sizes of its rows' images, and the images that replaced others."""

    def rows() -> Iterator[checksums.Files]:
        for batch in names():
            yield checksums.Files([words.text(name) for name in batch], *sizes.of(batch))

    sha256 = hashlib.sha256(bytes.fromhex(table.sha256))
    for files in rows():
        sha256.update(files.sizes.astype("<i8").tobytes())
    others = 0
    if recorded is not None:
        for row, content in checksums.replaced(*recorded, folder, limit, rows):
            sha256.update(b"%d %s\n" % (row, content))
            others += 1
    if others:
        _log.warning("%d images that %s names were replaced by others of their sizes", others, table.name)
    return table._replace(sha256=sha256.hexdigest())

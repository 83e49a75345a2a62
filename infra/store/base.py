"""The interface of all stores: objects by key, which appear whole or not at all."""

from __future__ import annotations

import math
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from infra.errors import NotFound, StoreError, UnsafeStore

SCRATCH = ".tmp"  # unfinished files and probes: never listed
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    key: str
    size: int
    modified: float = field(default=math.inf, compare=False)  # seconds since the epoch; where unknown it counts as new
    tag: str = field(default="", compare=False)  # changes when the object is rewritten; empty if unknown


def check_key(key: str) -> str:
    """The key itself, or StoreError: keys also come from records and listings, which others may have written."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        wrong = "is not relative, or has an empty, `.` or `..` part"
    elif any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 or 0xD800 <= ord(letter) < 0xE000 for letter in key):
        wrong = "has control characters, or is not Unicode"
    elif any(len(part.encode()) > 255 for part in parts):
        wrong = "has a part of more than 255 bytes"
    else:
        return key
    raise StoreError(f"the key {key[:200]!a} {wrong}", remedy="rename the object; keys look like a/b/c.tar")


class Store(ABC):
    """Objects by key. Stores pickle: a task in another process opens its own connection."""

    url: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end), clipped to the object; NotFound if there is none."""

    def get_tagged(self, key: str, start: int = 0, end: int | None = None) -> tuple[bytes, str]:
        """The same, with the `Entry.tag` of what was read."""
        return self.get(key, start, end), ""

    @abstractmethod
    def put(self, key: str, data: bytes | Path) -> None:
        """Write the object, over whatever was there."""

    @abstractmethod
    def create(self, key: str, data: bytes | Path) -> bool:
        """Write the object unless there is one; False if somebody was first."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose keys start with `prefix`, sorted by key, read page by page."""
        for entry in self.list_unchecked(prefix):
            check_key(entry.key)
            yield entry

    @abstractmethod
    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        """The same with unchecked keys, also of objects that other programs have put there."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of the object, None if there is none."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object, if there is one."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy the object to a file, which appears whole or not at all."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch, by the same clock as `Entry.modified`, which need not be this machine's."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def spool(self) -> BinaryIO:
        """A file for a large object that is about to be put. It has no name, so it vanishes with the process.

        `put` and `create` take it by its `spool_path`. On the store's own disk the file itself becomes the object,
        without a copy: do not write to it afterwards.
        """
        return tempfile.TemporaryFile()

    def probe(self) -> None:
        """Raise StoreUnreachable if the store does not answer, UnsafeStore if it ignores create-if-absent."""
        key = f"{SCRATCH}/probe-{uuid.uuid4().hex}"
        first = self.create(key, b"first")
        try:
            second = self.create(key, b"second")
            if not first or second or self.get(key) != b"first":
                raise UnsafeStore(
                    f"{self.url} ignores create-if-absent, so two workers could both believe that they were first",
                    remedy="use a server that honours If-None-Match on PutObject (AWS, R2 and Ceph do), or file://",
                )
        finally:
            with suppress(StoreError):  # must not hide an error from above
                self.delete(key)


def spool_path(spool: BinaryIO) -> Path:
    """The path of a file without a name, in this process."""
    spool.flush()
    return Path(f"/proc/self/fd/{spool.fileno()}")


def not_found(store: Store, key: str) -> NotFound:
    return NotFound(f"there is no object {key!a} in {store.url}", remedy="check the store's URL and the key")


def check_range(start: int, end: int | None) -> None:
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"[{start}, {end}) is not a range of bytes")

"""Where a corpus lies: a local folder or a store, read by names that strangers chose.

A name never leads out of its folder: not by "..", not by a leading slash, not by a symbolic link.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from data_prep.rejections import Cause, Rejection
from infra.errors import NotFound, SettingsError, StoreError
from infra.store import Store, check_key, open_store


class Folder(Protocol):
    def read(self, name: str, limit: int) -> bytes | Rejection: ...
    def open(self, name: str) -> BinaryIO: ...
    def names(self) -> Iterator[tuple[str, int, Cause | None]]:
        """Every file by name, with its size, and why it may not be read, if that is known."""


def open_folder(url: str) -> Folder:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalFolder(Path(unquote(parts.path)))
    return StoreFolder(open_store(url)) if parts.scheme else LocalFolder(Path(url))


class LocalFolder:
    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise SettingsError(f"there is no folder {root}", remedy="check the source's `url`")
        self.root = os.path.realpath(root)

    def read(self, name: str, limit: int) -> bytes | Rejection:
        if not _is_inside(name):
            return Rejection(Cause.OUTSIDE_FOLDER, name[:200])
        try:
            path = os.path.realpath(os.path.join(self.root, name))
            if os.path.commonpath((self.root, path)) != self.root:
                return Rejection(Cause.OUTSIDE_FOLDER, "a link that leads out of the folder")
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                return Rejection(Cause.UNREADABLE, "not a regular file")
            if found.st_size > limit:
                return Rejection(Cause.TOO_MANY_BYTES, f"{found.st_size} bytes")
            with open(path, "rb") as file:
                return file.read(limit)
        except FileNotFoundError:
            return Rejection(Cause.MISSING)
        except (OSError, ValueError) as error:
            return Rejection(Cause.UNREADABLE, type(error).__name__)

    def open(self, name: str) -> BinaryIO:
        path = Path(self.root, name)
        try:
            return path.open("rb")
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror})", remedy="check `tables`") from None

    def names(self) -> Iterator[tuple[str, int, Cause | None]]:
        for folder, subfolders, files in os.walk(self.root):
            for name in [*files, *subfolders]:
                path = os.path.join(folder, name)
                linked = os.path.islink(path)
                if name in subfolders and not linked:
                    continue
                where = os.path.realpath(path)
                outside = os.path.commonpath((self.root, where)) != self.root
                if name in subfolders and not outside:
                    continue  # a link to a subfolder: its files are met where they lie
                size = os.path.getsize(where) if os.path.exists(where) and not outside else 0
                yield os.path.relpath(path, self.root), size, Cause.OUTSIDE_FOLDER if outside else None


class StoreFolder:
    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, name: str, limit: int) -> bytes | Rejection:
        if not _is_inside(name):
            return Rejection(Cause.OUTSIDE_FOLDER, name[:200])
        try:
            check_key(name)
        except StoreError:
            return Rejection(Cause.BAD_NAME, repr(name)[:200])
        try:
            data = self.store.get(name, 0, limit + 1)
        except NotFound:
            return Rejection(Cause.MISSING)
        return Rejection(Cause.TOO_MANY_BYTES) if len(data) > limit else data

    def open(self, name: str) -> BinaryIO:
        size = self.store.size(name)
        if size is None:
            raise SettingsError(f"there is no {self.store.url}/{name}", remedy="check `tables` and `url`")
        return io.BufferedReader(_StoreFile(self.store, name, size), buffer_size=1 << 20)

    def names(self) -> Iterator[tuple[str, int, Cause | None]]:
        return ((entry.key, entry.size, None) for entry in self.store.list())


class _StoreFile(io.RawIOBase):
    """An object in a store as a seekable file, by ranged reads."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._store.get(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name

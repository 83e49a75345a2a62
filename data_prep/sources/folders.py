"""Where a corpus lies: a local folder or a store, read by names that strangers chose.

A name never leads out of its folder: not by "..", not by a leading slash, not by a symbolic link. Only a file that the
user names in the settings may lie elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from data_prep.rejections import Cause, Rejection
from infra.errors import NotFound, SettingsError, StoreError
from infra.store import Store, check_key, open_store

BUFFER = 1 << 20
EDGE = 64 << 10  # bytes at either end of a file that tell it from others


class File(NamedTuple):
    """What a folder tells of a file; one that is not entered as a folder ends in a slash."""

    name: str
    size: int
    refused: Cause | None = None  # why it may not be read, if that is known
    stamp: int = 0  # another one where it was written anew: its time, or what a store says; 0: nobody tells


class Folder(Protocol):
    def read(self, name: str, limit: int) -> bytes | Rejection: ...
    def look(self, name: str, limit: int) -> tuple[bytes | Rejection, int]:
        """The same, with the stamp of what was read."""

    def open(self, name: str, buffer: int = BUFFER) -> BinaryIO:
        """The file, to read at any place; of a store so many bytes are asked for at once."""

    def names(self) -> Iterator[File]:
        """Every file, sorted by `text_of` name, and every folder that is not entered."""

    def find(self, pattern: str) -> list[str]:
        """The files that match: `*` and `?` within one part of a path, `**` for any number of parts; sorted."""


def text_of(name: str) -> str:
    """A name as text that can be stored: bytes of it that are no UTF-8 are written out."""
    return name.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")


def matching(folder: Folder, patterns: Sequence[str], setting: str) -> list[str]:
    """The files that a setting names, each once: a name as it is, a pattern as all that matches it, sorted."""
    found: dict[str, None] = {}
    for pattern in patterns:
        here = folder.find(pattern) if _is_pattern(pattern) else [pattern]
        if not here:
            there = ", ".join(text_of(name) for name, *_ in islice(folder.names(), 10)) or "none"
            raise SettingsError(
                f"no file matches `{pattern}`", remedy=f"correct `{setting}` or `url`; the first files there: {there}"
            )
        found.update(dict.fromkeys(here))
    return list(found)


def fingerprint(folder: Folder, name: str) -> tuple[int, str]:
    """A large file's size, and a hash of its size, head and tail: enough to tell it from others at a glance."""
    with folder.open(name, EDGE) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(EDGE)
        file.seek(max(0, size - EDGE))
        return size, hashlib.sha256(f"{size}\n".encode() + head + file.read(EDGE)).hexdigest()


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
        return self.look(name, limit)[0]

    def look(self, name: str, limit: int) -> tuple[bytes | Rejection, int]:
        if not _is_inside(name):
            return Rejection(Cause.OUTSIDE_FOLDER, name[:200]), 0
        try:
            path = os.path.realpath(os.path.join(self.root, name))
            if os.path.commonpath((self.root, path)) != self.root:
                return Rejection(Cause.OUTSIDE_FOLDER, "a link that leads out of the folder"), 0
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                return Rejection(Cause.UNREADABLE, "not a regular file"), 0
            if found.st_size > limit:
                return Rejection(Cause.TOO_MANY_BYTES, f"{found.st_size} bytes"), 0
            with open(path, "rb") as file:
                return file.read(limit), _told(name, found).stamp
        except FileNotFoundError:
            return Rejection(Cause.MISSING), 0
        except (OSError, ValueError) as error:
            return Rejection(Cause.UNREADABLE, type(error).__name__), 0

    def open(self, name: str, buffer: int = BUFFER) -> BinaryIO:
        path = Path(self.root, name)
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for ever
                raise SettingsError(f"{path} is not a regular file", remedy="name a file")
            return path.open("rb")
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror})", remedy="check its name") from None

    def names(self) -> Iterator[File]:
        for name, entry in self._walk(""):
            if entry is None:
                yield File(f"{name.rstrip('/')}/", 0, Cause.UNREADABLE)
            elif not entry.is_symlink():
                with suppress(FileNotFoundError):  # gone since it was seen
                    yield _told(name, entry.stat(follow_symlinks=False))
            elif not self._is_inside(entry.path):
                yield File(name + "/" * os.path.isdir(entry.path), 0, Cause.OUTSIDE_FOLDER)
            elif os.path.isdir(entry.path):  # its files are met where they lie, and the link may lead in circles
                yield File(f"{name}/", 0, Cause.UNREADABLE)
            else:
                yield _told(name, os.stat(entry.path)) if os.path.exists(entry.path) else File(name, 0)

    def find(self, pattern: str) -> list[str]:
        found = []
        for name, entry in self._walk(_fixed(pattern), None if "**" in pattern else pattern.count("/")):
            if entry is None or not _matches(name.split("/"), pattern.split("/")) or not entry.is_file():
                continue
            if entry.is_symlink() and not self._is_inside(entry.path):
                raise SettingsError(
                    f"{entry.path} is a link that leads out of the folder",
                    remedy="name the file itself instead of a pattern, if it is yours",
                )
            found.append(name)
        return found

    def _walk(self, base: str, deepest: int | None = None) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
        """What lies below, folders and links to them not entered twice; None for a folder that may not be read."""
        open_folders = [self._entries(base)]
        while open_folders:
            name, entry = next(open_folders[-1], ("", None))
            if not name:
                open_folders.pop()
            elif entry is None or not entry.is_dir(follow_symlinks=False):
                yield name, entry
            elif deepest is None or name.count("/") < deepest:
                open_folders.append(self._entries(f"{name}/"))

    def _entries(self, base: str) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
        """Sorted so that, walked in this order, whole names are sorted: a folder by its name with a slash."""
        try:
            with os.scandir(os.path.join(self.root, base)) as found:
                here = [(text_of(e.name) + "/" * e.is_dir(follow_symlinks=False), e) for e in found]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            yield base.rstrip("/") or ".", None
            return
        for _, entry in sorted(here, key=lambda pair: pair[0]):
            yield base + entry.name, entry

    def _is_inside(self, path: str) -> bool:
        return os.path.commonpath((self.root, os.path.realpath(path))) == self.root


class StoreFolder:
    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, name: str, limit: int) -> bytes | Rejection:
        return self.look(name, limit)[0]

    def look(self, name: str, limit: int) -> tuple[bytes | Rejection, int]:
        if not _is_inside(name):
            return Rejection(Cause.OUTSIDE_FOLDER, name[:200]), 0
        if not is_key(name):
            return Rejection(Cause.BAD_NAME, repr(name)[:200]), 0
        try:
            data, tag = self.store.get_tagged(name, 0, limit + 1)
        except NotFound:
            return Rejection(Cause.MISSING), 0
        return (Rejection(Cause.TOO_MANY_BYTES), 0) if len(data) > limit else (data, _stamp(tag))

    def open(self, name: str, buffer: int = BUFFER) -> BinaryIO:
        size = self.store.size(name)
        if size is None:
            raise SettingsError(f"there is no {self.store.url}/{name}", remedy="check its name and `url`")
        return io.BufferedReader(_StoreFile(self.store, name, size), buffer_size=buffer)

    def names(self) -> Iterator[File]:
        for entry in self.store.list_unchecked():
            yield File(entry.key, entry.size, None if is_key(entry.key) else Cause.BAD_NAME, _stamp(entry.tag))

    def find(self, pattern: str) -> list[str]:
        parts = pattern.split("/")
        found = self.store.list_unchecked(_fixed(pattern))
        return [check_key(entry.key) for entry in found if _matches(entry.key.split("/"), parts)]


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


def _told(name: str, about: os.stat_result) -> File:
    return File(name, about.st_size, None, about.st_mtime_ns or 1)  # at the epoch there is a time, too


def _stamp(tag: str) -> int:
    """A store's word as a number."""
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), signed=True) if tag else 0


def is_key(name: str) -> bool:
    try:
        check_key(name)
    except StoreError:
        return False
    return True


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _fixed(pattern: str) -> str:
    """The folders that a pattern names before anything in it may vary."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if _is_pattern(part))
    return "".join(f"{part}/" for part in parts[:first])


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return (not hidden and _matches(parts[1:], pattern)) or _matches(parts, pattern[1:])
    return not hidden and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])

"""The folder that holds a corpus, local or in a store, read by names that are in the corpus and are not trusted.

A name never leads out of the folder: not by "..", not by a leading slash, not by a symbolic link. Only a file that the
user names in the settings may be elsewhere.
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
EDGE = 64 << 10  # bytes at either end of a file that its fingerprint is made of


class File(NamedTuple):
    """An entry of a folder's listing. A folder that is not entered is listed with a slash at the end of its name."""

    name: str
    size: int
    refused: Cause | None = None  # why it may not be read, if that is known
    stamp: int = 0  # changes when the file is written anew: its time, or a hash of its ETag; 0: unknown


class Folder(Protocol):
    def read(self, name: str, limit: int) -> bytes | Rejection:
        """A file's bytes; one of more than `limit` is refused."""
        return self.read_stamped(name, limit)[0]

    def read_stamped(self, name: str, limit: int) -> tuple[bytes | Rejection, int]:
        """A file's bytes and its stamp."""

    def open(self, name: str, buffer: int = BUFFER) -> BinaryIO:
        """The file, seekable; in a store, `buffer` bytes are fetched with each request."""

    def names(self) -> Iterator[File]:
        """Every file and every folder that is not entered, sorted by `text_of` the name."""

    def find(self, pattern: str) -> list[str]:
        """The files that match, sorted: `*` and `?` within one part of a path, `**` for any number of parts.

        `train/*.tar` matches train/0.tar but not train/a/0.tar; `**/*.tar` matches both.
        """


def text_of(name: str) -> str:
    """A name as text that can be stored: bytes that are not UTF-8 are written as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")


def matching(folder: Folder, patterns: Sequence[str], setting: str) -> list[str]:
    """The files that a setting names, each once: a plain name as it is, a pattern as the sorted files that match it."""
    names: dict[str, None] = {}
    for pattern in patterns:
        matches = folder.find(pattern) if _is_pattern(pattern) else [pattern]
        if not matches:
            first = ", ".join(text_of(name) for name, *_ in islice(folder.names(), 10)) or "none"
            raise SettingsError(
                f"no file matches `{pattern}`", remedy=f"correct `{setting}` or `url`; the first files there: {first}"
            )
        names.update(dict.fromkeys(matches))
    return list(names)


def fingerprint(folder: Folder, name: str) -> tuple[int, str]:
    """A file's size, and a hash of its size and its first and last EDGE bytes: an identity without reading it all."""
    with folder.open(name, EDGE) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(EDGE)
        file.seek(max(0, size - EDGE))
        return size, hashlib.sha256(f"{size}\n".encode() + head + file.read(EDGE)).hexdigest()


def open_folder(url: str) -> Folder:
    """The folder at /data/cats, at file:///data/cats, or in a store: s3://bucket/cats."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalFolder(Path(unquote(parts.path)))
    return StoreFolder(open_store(url)) if parts.scheme else LocalFolder(Path(url))


class LocalFolder(Folder):
    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise SettingsError(f"there is no folder {root}", remedy="check the source's `url`")
        self.root = os.path.realpath(root)

    def read_stamped(self, name: str, limit: int) -> tuple[bytes | Rejection, int]:
        if not _is_inside(name):
            return Rejection(Cause.OUTSIDE_FOLDER, name[:200]), 0
        try:
            path = os.path.realpath(os.path.join(self.root, name))
            if os.path.commonpath((self.root, path)) != self.root:
                return Rejection(Cause.OUTSIDE_FOLDER, "a link that leads out of the folder"), 0
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                return Rejection(Cause.UNREADABLE, "not a regular file"), 0
            if status.st_size > limit:
                return Rejection(Cause.TOO_MANY_BYTES, f"{status.st_size} bytes"), 0
            with open(path, "rb") as file:
                return file.read(limit), _file(name, status).stamp
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
                with suppress(FileNotFoundError):  # deleted since the folder was listed
                    yield _file(name, entry.stat(follow_symlinks=False))
            elif not self._is_inside(entry.path):
                yield File(name + "/" * os.path.isdir(entry.path), 0, Cause.OUTSIDE_FOLDER)
            elif os.path.isdir(entry.path):  # its files are listed where they are, and following it may be endless
                yield File(f"{name}/", 0, Cause.UNREADABLE)
            else:
                yield _file(name, os.stat(entry.path)) if os.path.exists(entry.path) else File(name, 0)

    def find(self, pattern: str) -> list[str]:
        names = []
        for name, entry in self._walk(_fixed(pattern), None if "**" in pattern else pattern.count("/")):
            if entry is None or not _matches(name.split("/"), pattern.split("/")) or not entry.is_file():
                continue
            if entry.is_symlink() and not self._is_inside(entry.path):
                raise SettingsError(
                    f"{entry.path} is a link that leads out of the folder",
                    remedy="name the file itself instead of a pattern, if it is yours",
                )
            names.append(name)
        return names

    def _walk(self, base: str, deepest: int | None = None) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
        """Files and symbolic links below a folder; None instead of an entry for a folder that may not be read."""
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
        """A folder's entries, sorted as if folders ended in a slash: so `_walk` gives whole paths in sorted order."""
        try:
            with os.scandir(os.path.join(self.root, base)) as listing:
                entries = [(text_of(e.name) + "/" * e.is_dir(follow_symlinks=False), e) for e in listing]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            yield base.rstrip("/") or ".", None
            return
        for _, entry in sorted(entries, key=lambda pair: pair[0]):
            yield base + entry.name, entry

    def _is_inside(self, path: str) -> bool:
        return os.path.commonpath((self.root, os.path.realpath(path))) == self.root


class StoreFolder(Folder):
    def __init__(self, store: Store) -> None:
        self.store = store

    def read_stamped(self, name: str, limit: int) -> tuple[bytes | Rejection, int]:
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
        entries = self.store.list_unchecked(_fixed(pattern))
        return [check_key(entry.key) for entry in entries if _matches(entry.key.split("/"), parts)]


class _StoreFile(io.RawIOBase):
    """An object in a store as a seekable file; it is read by ranged requests."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._store.get(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _file(name: str, status: os.stat_result) -> File:
    return File(name, status.st_size, None, status.st_mtime_ns or 1)  # 0 would say that the time is unknown


def _stamp(tag: str) -> int:
    """A store's ETag hashed to a number, as a local file's time is one."""
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
    """The leading folders of a pattern that hold no wildcard: `train/` of `train/*.tar`."""
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

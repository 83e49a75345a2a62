"""A machine's cache of what training reads: a bounded folder, shared by its ranks and kept from run to run.

    <sha256>.tar          a shard's tar
    <sha256>-1.arrow      a selection, in the layout of `selection.py`
    making-<name>/        what is being fetched or made; it is moved to its place when it is whole
    lock-<xx>             locked while a name that hashes to xx is made, and lock-room while files are deleted

A file's name tells the hash of what it was made from. Readers open a file for each read, so few are open at a time, and
a file may be deleted at any moment: what is missing is read from the store.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from infra.errors import SettingsError
from infra.files import sha256_of
from infra.records import fetch_named, named_sha256
from infra.store import Store

_FETCHES = 2  # at a time and rank: more would not be faster on one network card, and would open more files
_SPARE = 0.05  # of the disk, which the cache leaves free whatever its bound
_MAKING, _LOCK = "making-", "lock-"


def default_folder() -> Path:
    """This user's cache among the machine's temporary files.

    Its name does not begin like those of the folders that `infra.scratch` sweeps.
    """
    return Path(tempfile.gettempdir()) / _own_name()


def _own_name() -> str:
    return f"pixnerd_cache-{os.geteuid()}"


class Folder:
    """The cache's folder: files by name, each made once by one process, the least recently used deleted first."""

    def __init__(self, path: Path, gigabytes: float) -> None:
        self.path, self.bound = path, int(gigabytes * 1e9)
        self.kept: set[Path] = set()  # files that this process maps into memory
        with self._writing():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.name == _own_name() and (path.is_symlink() or path.stat().st_uid != os.geteuid()):
            # Anybody may make a folder of this name among the temporary ones; a folder that was set is the user's word.
            raise SettingsError(
                f"{path} is not this user's own folder, so others could change what is read",
                remedy="set reading.cache to a folder of your own",
            )
        self._sweep()

    def read(self, name: str, offset: int, length: int) -> bytes | None:
        """Bytes of a file, which counts as a use of it; None if it is not there, or shorter."""
        try:
            file = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            with suppress(OSError):
                os.utime(file)
            data = os.pread(file, length, offset)
        finally:
            os.close(file)
        return data if len(data) == length else None

    def made(self, name: str, make: Callable[[Path], None], size: int, check: Callable[[Path], bool]) -> Path:
        """The file of that name, made with `make` if it is absent or fails its check; others wait meanwhile."""
        path, unfinished = self.path / name, self.path / f"{_MAKING}{name}"
        with self._writing(), self._locked(_bucket(name)):
            if path.exists():
                os.utime(path)
                if check(path):
                    return path
                path.unlink()
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: its lock is free
            self._make_room(size)
            unfinished.mkdir()
            try:
                make(unfinished / name)
                os.replace(unfinished / name, path)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return path

    def _make_room(self, size: int) -> None:
        """Deletes the least recently used files until `size` more bytes fit."""
        with self._locked("room"):
            for path in self.kept:
                with suppress(FileNotFoundError):
                    os.utime(path)
            files = sorted(self._files())
            used = sum(bytes_ for _, bytes_, _ in files)
            disk = shutil.disk_usage(self.path)
            limit = min(self.bound, used + disk.free - int(_SPARE * disk.total))
            for _, bytes_, path in files:
                if used + size <= limit:
                    return
                if path not in self.kept:
                    path.unlink(missing_ok=True)
                    used -= bytes_

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was used last, its bytes, and its path."""
        for entry in os.scandir(self.path):
            if entry.is_file(follow_symlinks=False) and not entry.name.startswith(_LOCK):
                with suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    yield about.st_mtime, about.st_size, Path(entry.path)

    def _sweep(self) -> None:
        """Deletes what killed processes left half made: their locks are free."""
        for path in self.path.glob(f"{_MAKING}*"):
            with suppress(BlockingIOError), self._locked(_bucket(path.name.removeprefix(_MAKING)), fcntl.LOCK_NB):
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, flags: int = 0) -> Iterator[None]:
        lock = os.open(self.path / f"{_LOCK}{name}", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | flags)
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SettingsError(
                f"the cache {self.path} cannot be written ({error.strerror or error})",
                remedy="set reading.cache to a folder with room, or reading.cache_gb lower",
            ) from error


def _bucket(name: str) -> str:
    """The lock for a name: one of 256, so that no lock's file has to be deleted."""
    return f"{zlib.crc32(name.encode()) & 255:02x}"


class Tars:
    """The tars that hold the images. Those begun are fetched in threads; before they are there, reads are by range.

    Whatever is in the cache is checked against its hash before this process reads from it, and `settle` makes sure of
    what was read by range.
    """

    def __init__(self, store: Store, folder: Folder) -> None:
        self.store, self.folder = store, folder
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="tars")
        self._lock = threading.Lock()
        self._fetches: dict[str, Future[None]] = {}
        self._by_range: set[str] = set()

    def begin(self, key: str) -> Future[None]:
        """Fetch the tar in the background, unless that has begun."""
        with self._lock:
            if key not in self._fetches:
                self._fetches[key] = self._pool.submit(self._fetch, key)
            return self._fetches[key]

    def read(self, key: str, offset: int, length: int) -> bytes:
        fetch = self._fetches.get(key)
        if fetch is not None and fetch.done():
            fetch.result()  # raises what went wrong
            if (data := self.folder.read(_name(key), offset, length)) is not None:
                return data
        with self._lock:
            if fetch is not None and fetch.done() and self._fetches.get(key) is fetch:
                del self._fetches[key]  # it was deleted to make room; `settle` fetches it once more
            self._by_range.add(key)
        return self.store.get(key, offset, offset + length)

    def settle(self) -> None:
        """Waits for the tars of which something was read by range; raises if one of them is damaged."""
        with self._lock:
            keys, self._by_range = sorted(self._by_range), set()
        for fetch in [self.begin(key) for key in keys]:
            fetch.result()

    def _fetch(self, key: str) -> None:
        def fetch(path: Path) -> None:
            fetch_named(self.store, key, path)

        sha256 = named_sha256(key)
        self.folder.made(_name(key), fetch, self.store.size(key) or 0, lambda path: sha256_of(path) == sha256)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _name(key: str) -> str:
    return f"{named_sha256(key) or 'unnamed'}.tar"

"""A store that is a folder, of this machine or mounted from another one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from infra.errors import NotFound, StoreError, StoreUnreachable
from infra.files import appearing
from infra.outage import ride_out
from infra.store.base import COPY_BYTES, SCRATCH, Entry, Store, check_key, check_range, not_found
from infra.store.settings import FIRST_PAUSE, PATIENCE

T = TypeVar("T")

STALE_SECONDS = 24 * 3600.0  # a scratch file this old belongs to a process that was killed
# What a network filesystem answers while its server is away, and after it has come back.
AWAY = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}


class FileStore(Store):
    """A folder. Objects are written in its `.tmp` first, so the folder must be one filesystem.

    It may be one of another machine. While that is away the calls wait, and whichever the outage met is made again: so
    each can be made twice.
    """

    def __init__(self, root: Path, patience: float = PATIENCE) -> None:
        self.root, self.patience = root.resolve(), patience
        self.url = self.root.as_uri()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end)

        def read() -> bytes:
            with self._path(key).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(start)
                return file.read(max(0, (size if end is None else min(end, size)) - start))

        return self._do(key, read)

    def opened(self, key: str) -> BinaryIO:
        """The object to read from, here and there, without a way to it each time."""
        return self._do(key, lambda: self._path(key).open("rb"))

    def put(self, key: str, data: bytes | Path) -> None:
        with self._scratch(key, data) as temporary:
            number = self._do(key, lambda: temporary.stat().st_ino, writing=True)

            def move() -> None:
                path = self._path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.replace(temporary, path)
                except FileNotFoundError:
                    if not path.exists() or path.stat().st_ino != number:
                        raise
                    # It was moved by a call whose answer was lost.
                _sync_folder(path.parent)

            self._do(key, move, writing=True)

    def create(self, key: str, data: bytes | Path) -> bool:
        with self._scratch(key, data) as temporary:

            def link() -> bool:
                path = self._path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    if path.is_dir():
                        raise IsADirectoryError(path) from None
                    # The answer to a link that was made may have been lost; the link count knows.
                    if temporary.stat().st_nlink < 2:
                        return False
                _sync_folder(path.parent)
                return True

            return self._do(key, link, writing=True)

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        folder, slash, _ = prefix.rpartition("/")
        yield from self._walk(folder + slash, prefix)

    def _walk(self, base: str, prefix: str) -> Iterator[Entry]:
        for key, entry in self._do(base, lambda: self._below(base, prefix)):
            if entry is not None:
                yield entry
            elif key != f"{SCRATCH}/":
                yield from self._walk(key, prefix)

    def _below(self, base: str, prefix: str) -> list[tuple[str, Entry | None]]:
        """What a folder holds: files, and folders, which come without an entry."""
        found: list[tuple[str, Entry | None]] = []
        try:
            listed = os.scandir(self._path(base[:-1]) if base else self.root)
        except (FileNotFoundError, NotADirectoryError):
            return found
        with listed:
            for item in listed:
                folder = item.is_dir(follow_symlinks=False)
                key = base + item.name + "/" * folder  # with its slash, a folder sorts where the keys below it do
                if not key.startswith(prefix) and not prefix.startswith(key):
                    continue
                if folder:
                    found.append((key, None))
                elif item.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # deleted since it was seen
                        about = item.stat(follow_symlinks=False)
                        found.append((key, Entry(key, about.st_size, about.st_mtime)))
        return sorted(found, key=lambda pair: os.fsencode(pair[0]))

    def size(self, key: str) -> int | None:
        try:
            found = self._do(key, lambda: self._path(key).stat())
        except NotFound:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def delete(self, key: str) -> None:
        with suppress(NotFound):
            self._do(key, lambda: self._path(key).unlink())

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as unfinished, unfinished.open("xb") as file:

            def copy() -> None:
                with self._path(key).open("rb") as found:
                    file.seek(0)
                    file.truncate()
                    shutil.copyfileobj(found, file, COPY_BYTES)

            self._do(key, copy)

    def spool(self) -> BinaryIO:
        def begin() -> BinaryIO:
            folder = self._path(SCRATCH)
            folder.mkdir(parents=True, exist_ok=True)
            try:  # not through tempfile, whose files may never get a name
                return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
            except OSError:  # not every filesystem has them
                return tempfile.TemporaryFile(dir=folder)

        return self._do(SCRATCH, begin, writing=True)

    def now(self) -> float:
        with suppress(OSError), tempfile.TemporaryFile(dir=self.root) as new:
            return os.fstat(new.fileno()).st_mtime
        return time.time()  # it cannot be written: then nothing there can be deleted either

    def probe(self) -> None:
        super().probe()
        stale = self.now() - STALE_SECONDS
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root / SCRATCH):
                with suppress(FileNotFoundError):  # another probe was faster
                    if entry.stat().st_mtime < stale and _is_free(Path(entry.path)):
                        os.unlink(entry)

    def _path(self, key: str) -> Path:
        path = self.root
        for part in check_key(key).split("/"):
            path = path / part
            if path.is_symlink():  # it could lead anywhere
                raise StoreError(
                    f"{key!a} in {self.url} goes through a symbolic link",
                    remedy="put a real file or folder in its place",
                )
        return path

    @contextmanager
    def _scratch(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """The data in a file of this filesystem, safely on disk."""
        temporary = self.root / SCRATCH / uuid.uuid4().hex
        with ExitStack() as opened:
            source = opened.enter_context(data.open("rb")) if isinstance(data, Path) else None

            def fill() -> None:
                self._path(SCRATCH).mkdir(parents=True, exist_ok=True)
                temporary.unlink(missing_ok=True)  # of an attempt that failed
                if source is not None and _named(source, temporary):
                    _hold(source)
                    return
                with ExitStack() as attempt:
                    file = attempt.enter_context(temporary.open("xb"))
                    _hold(file)
                    if source is None:
                        file.write(data)  # type: ignore[arg-type]
                    else:
                        if source.seekable():  # not a pipe, which only the first attempt can read
                            source.seek(0)
                        shutil.copyfileobj(source, file, COPY_BYTES)
                    _sync(file)
                    opened.enter_context(attempt.pop_all())  # held until it has its name

            try:
                self._do(key, fill, writing=True)
                yield temporary
            finally:
                with suppress(OSError):  # a later probe sweeps
                    temporary.unlink(missing_ok=True)

    def _do(self, key: str, work: Callable[[], T], *, writing: bool = False) -> T:
        with self._explained(key, writing=writing):
            return ride_out(self.url, work, _away, self.patience, FIRST_PAUSE)

    @contextmanager
    def _explained(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StoreUnreachable(
                f"{self.url} may not be {'written' if writing else 'read'} at {key!a}",
                remedy="give this user the right to read and write there",
            ) from error
        except OSError as error:
            if not writing and isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
                raise not_found(self, key) from None
            if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
                remedy = "on disk a key cannot be an object and a folder at once: choose another key"
            elif _away(error):
                remedy = "see that the disk is sound, or the server that it is mounted from up, then run again"
            else:
                remedy = "check the disk and its free space; the filesystem must allow hard links"
            raise StoreError(f"{self.url} failed at {key!a} ({error.strerror or error})", remedy=remedy) from error


def _away(error: Exception) -> str:
    """What passes by itself of a folder's errors."""
    return str(error.strerror) if isinstance(error, OSError) and error.errno in AWAY else ""


def _named(file: BinaryIO, path: Path) -> bool:
    """Whether a spool of this disk could be given a name in place of being copied; then it is safely on disk."""
    if os.fstat(file.fileno()).st_nlink:
        return False  # a file of somebody's: two names for it would let one change the other
    try:
        # Any folder, so that Python calls linkat: link would name the link in /proc, not the file.
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)
    except OSError:  # it lies on another disk
        return False
    _sync(file)
    return True


def _hold(file: BinaryIO) -> None:
    """Until it is closed, however its process ends, nobody takes it for left by a killed one."""
    with suppress(OSError):  # not every filesystem has locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_free(path: Path) -> bool:
    """Whether no process holds the file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut once its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

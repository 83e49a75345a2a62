"""A store that is a folder, on a local or a network filesystem."""

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
# Errors of a disk that is written to: a call that only reads the store meets them where it copies to.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of a network filesystem while its server is away, and just after it has come back.
AWAY = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}


class FileStore(Store):
    """A folder. Objects are written in its `.tmp` first, so the folder must be one filesystem.

    While the server of a network filesystem is away, calls are repeated. A call that succeeded, but whose answer was
    lost, is then made twice; every method allows for that.
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
        """The object as an open file, for many reads at different places."""
        return self._do(key, lambda: self._path(key).open("rb"))

    def put(self, key: str, data: bytes | Path) -> None:
        with self._scratch(key, data) as temporary:
            inode = self._do(key, lambda: temporary.stat().st_ino, writing=True)

            def move() -> None:
                path = self._path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.replace(temporary, path)
                except FileNotFoundError:
                    if not path.exists() or path.stat().st_ino != inode:
                        raise
                    # An earlier attempt, whose answer was lost, has moved it.
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
                    # It may be the link of an earlier attempt, whose answer was lost: then the file has two links.
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
        """The files and folders in a folder, by key; folders have no entry."""
        children: list[tuple[str, Entry | None]] = []
        try:
            listed = os.scandir(self._path(base[:-1]) if base else self.root)
        except (FileNotFoundError, NotADirectoryError):
            return children
        with listed:
            for item in listed:
                folder = item.is_dir(follow_symlinks=False)
                key = base + item.name + "/" * folder  # with its slash a folder sorts as the keys in it do
                if not key.startswith(prefix) and not prefix.startswith(key):
                    continue
                if folder:
                    children.append((key, None))
                elif item.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        about = item.stat(follow_symlinks=False)
                        children.append((key, Entry(key, about.st_size, about.st_mtime)))
        return sorted(children, key=lambda pair: os.fsencode(pair[0]))

    def size(self, key: str) -> int | None:
        try:
            status = self._do(key, lambda: self._path(key).stat())
        except NotFound:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def delete(self, key: str) -> None:
        with suppress(NotFound):
            self._do(key, lambda: self._path(key).unlink())

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as unfinished, unfinished.open("xb") as file:

            def copy() -> None:
                with self._path(key).open("rb") as source:
                    file.seek(0)
                    file.truncate()
                    shutil.copyfileobj(source, file, COPY_BYTES)

            self._do(key, copy)

    def spool(self) -> BinaryIO:
        def begin() -> BinaryIO:
            folder = self._path(SCRATCH)
            folder.mkdir(parents=True, exist_ok=True)
            try:  # tempfile opens with O_EXCL, and such a file can never get a name
                return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
            except OSError:  # not every filesystem has files without a name
                return tempfile.TemporaryFile(dir=folder)

        return self._do(SCRATCH, begin, writing=True)

    def now(self) -> float:
        with suppress(OSError), tempfile.TemporaryFile(dir=self.root) as new:
            return os.fstat(new.fileno()).st_mtime
        return time.time()  # the folder is read-only: nothing in it can be deleted, so its clock does not matter

    def probe(self) -> None:
        super().probe()
        stale = self.now() - STALE_SECONDS
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root / SCRATCH):
                with suppress(FileNotFoundError):  # another probe has just deleted it
                    if entry.stat().st_mtime < stale and _is_free(Path(entry.path)):
                        os.unlink(entry)

    def _path(self, key: str) -> Path:
        path = self.root
        for part in check_key(key).split("/"):
            path = path / part
            if path.is_symlink():  # which could lead out of the folder
                raise StoreError(
                    f"{key!a} in {self.url} goes through a symbolic link",
                    remedy="put a real file or folder in its place",
                )
        return path

    @contextmanager
    def _scratch(self, key: str, data: bytes | Path) -> Iterator[Path]:
        """The data in a temporary file of this filesystem, flushed to disk."""
        temporary = self.root / SCRATCH / uuid.uuid4().hex
        with ExitStack() as opened:
            source = opened.enter_context(data.open("rb")) if isinstance(data, Path) else None

            def fill() -> None:
                self._path(SCRATCH).mkdir(parents=True, exist_ok=True)
                temporary.unlink(missing_ok=True)  # of an earlier attempt
                if source is not None and _named(source, temporary):
                    _hold(source)
                    return
                with ExitStack() as attempt:
                    file = attempt.enter_context(temporary.open("xb"))
                    _hold(file)
                    if source is None:
                        file.write(data)  # type: ignore[arg-type]
                    else:
                        if source.seekable():  # a pipe is not seekable, and only the first attempt can read it
                            source.seek(0)
                        shutil.copyfileobj(source, file, COPY_BYTES)
                    _sync(file)
                    opened.enter_context(attempt.pop_all())  # stays locked until it is moved or linked

            try:
                self._do(key, fill, writing=True)
                yield temporary
            finally:
                with suppress(OSError):  # a later probe deletes it
                    temporary.unlink(missing_ok=True)

    def _do(self, key: str, work: Callable[[], T], *, writing: bool = False) -> T:
        """Call `work`, repeated while the filesystem is away, with its errors raised as ours."""
        try:
            return ride_out(self.url, work, _away, self.patience, FIRST_PAUSE)
        except PermissionError as error:
            raise StoreUnreachable(
                f"{self.url} may not be {'written' if writing else 'read'} at {key!a}",
                remedy="give this user the right to read and write there",
            ) from error
        except OSError as error:
            if not writing and error.errno in FULL:
                raise
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
    """The text of an error that may pass by itself; empty for any other error."""
    return str(error.strerror) if isinstance(error, OSError) and error.errno in AWAY else ""


def _named(file: BinaryIO, path: Path) -> bool:
    """Whether `file` is a spool of this disk, which could be named instead of copied; then it is also flushed."""
    if os.fstat(file.fileno()).st_nlink:
        return False  # a file with a name: with two names, a change through one would change the other
    try:
        # src_dir_fd makes Python call linkat; link would link to the symbolic link in /proc, not to the file.
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)
    except OSError:  # it lies on another disk
        return False
    _sync(file)
    return True


def _hold(file: BinaryIO) -> None:
    """Lock the file until it is closed or its process ends, so that no probe deletes it."""
    with suppress(OSError):  # not every filesystem has locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_free(path: Path) -> bool:
    """Whether no process has locked the file."""
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

"""Temporary folders that tell whether anybody still works in them, and the removal of those that nobody does.

A process that is killed cannot remove what it wrote. So a folder holds a file with a lock of the kernel on it, which
ends with its process however that ends, and whoever comes next removes the folders whose locks are free. A process in
another container or on another host of a shared disk holds its lock just as well, where a number of a process would
tell nothing.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PREFIX = "pixnerd-"
HELD = ".held"  # the file with the lock
STALE_SECONDS = 24 * 3600.0  # a folder without such a file is an older version's, and may be in use until then


class Removed(NamedTuple):
    folders: int
    bytes: int

    def __add__(self, other: object) -> Removed:
        assert isinstance(other, Removed)
        return Removed(self.folders + other.folders, self.bytes + other.bytes)

    def __str__(self) -> str:
        return f"{self.folders:,} folders, {self.bytes / 2**20:,.1f} MiB"


@contextmanager
def folder(kind: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder for as long as the body runs, among the machine's temporary ones or in `parent`."""
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=parent))
    try:
        lock = os.open(path / f"{HELD}-new", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            with suppress(OSError):  # a filesystem without locks: then nobody can take the folder either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(path / f"{HELD}-new", path / HELD)  # under this name it is never free while it is needed
            yield path
        finally:
            remove(path)
            os.close(lock)
    finally:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def everything_in(folder: Path) -> Iterator[None]:
    """All temporary files of this process, and of those that it starts meanwhile, are made in the folder."""
    before, given = tempfile.tempdir, os.environ.get("TMPDIR")
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))  # compiled networks are for later runs as well
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        del os.environ["TMPDIR"]
        if given is not None:
            os.environ["TMPDIR"] = given


def remove(path: Path) -> int:
    """Delete a folder, its lock last: a kill in the middle leaves what can be found. How many bytes it held."""
    found = 0
    for below in _inside(path):
        if below.name != HELD:
            found += size(below)
            if below.is_dir() and not below.is_symlink():
                shutil.rmtree(below, ignore_errors=True)
            else:
                with suppress(OSError):
                    below.unlink()
    if all(below.name == HELD for below in _inside(path)):
        with suppress(OSError):
            (path / HELD).unlink(missing_ok=True)
            path.rmdir()
    return found


def sweep(parents: Iterable[Path] = (), pattern: str = f"{PREFIX}.*", *, dry_run: bool = False) -> Removed:
    """Remove this user's folders in `parents` whose names match and which nobody holds; none: temporary folders."""
    total = Removed(0, 0)
    for parent in dict.fromkeys(parents or places()):
        for path in _inside(parent):
            if re.fullmatch(pattern, path.name) and _is_ours(path):
                with _taken(path) as taken:
                    if taken:
                        total += Removed(1, size(path) if dry_run else remove(path))
    return total


def places() -> list[Path]:
    """Where this machine's temporary folders are made: those of Ray have names that must be short."""
    return [Path(tempfile.gettempdir()), short_place()]


def short_place() -> Path:
    """A place for Ray's sockets: the system takes no path of more than 107 bytes, and Ray's names have some 90."""
    given = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(given if len(os.fsencode(given)) <= 16 else "/tmp")


@contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether nobody holds the folder; while the body runs, nobody else can take it."""
    try:
        lock = os.open(path / HELD, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield _is_old(path)
        return
    except OSError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = os.fstat(lock).st_nlink > 0  # else somebody else has just removed it
    except OSError:
        taken = False
    try:
        yield taken
    finally:
        os.close(lock)


def _is_ours(path: Path) -> bool:
    with suppress(OSError):
        about = path.lstat()
        return about.st_uid == os.geteuid() and path.is_dir() and not path.is_symlink()
    return False


def _is_old(path: Path) -> bool:
    """By the clock of its filesystem, and by the newest of what lies in it."""
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as new:
        newest = max(below.lstat().st_mtime for below in (path, *_inside(path)))
        return newest < os.fstat(new.fileno()).st_mtime - STALE_SECONDS
    return False


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what goes away meanwhile counts nothing."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        return sum(size(below) for below in _inside(path))
    return 0


def _inside(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []

"""Temporary folders that show whether they are in use, and the removal of those that are not.

A process that is killed cannot remove its temporary folder. So each folder holds a file that its process locks, and the
kernel frees the lock when the process ends, in whatever way. A later run removes the folders whose locks are free.
Locks also work between containers and between hosts that share a disk, where process numbers would tell nothing.
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
STALE_SECONDS = 24 * 3600.0  # a younger folder without that file is of an earlier version, and may be in use


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
    """A new folder that exists while the body runs, among the machine's temporary ones or in `parent`."""
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=parent))
    try:
        lock = os.open(path / f"{HELD}-new", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            with suppress(OSError):  # no locks on this filesystem: then no sweep takes the folder either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(path / f"{HELD}-new", path / HELD)  # only now, so that HELD is never unlocked while in use
            yield path
        finally:
            remove(path)
            os.close(lock)
    finally:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def everything_in(folder: Path) -> Iterator[None]:
    """While the body runs, this process and those that it starts make their temporary files in the folder."""
    tempdir, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))  # kept, so that later runs can use it
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = tempdir
        del os.environ["TMPDIR"]
        if variable is not None:
            os.environ["TMPDIR"] = variable


def remove(path: Path) -> int:
    """Delete a folder, its lock last, so that a later run finds it after a kill in the middle. Returns its bytes."""
    freed = 0
    for below in _inside(path):
        if below.name != HELD:
            freed += size(below)
            if below.is_dir() and not below.is_symlink():
                shutil.rmtree(below, ignore_errors=True)
            else:
                with suppress(OSError):
                    below.unlink()
    if all(below.name == HELD for below in _inside(path)):
        with suppress(OSError):
            (path / HELD).unlink(missing_ok=True)
            path.rmdir()
    return freed


def sweep(parents: Iterable[Path] = (), pattern: str = f"{PREFIX}.*", *, dry_run: bool = False) -> Removed:
    """Remove this user's folders in `parents` whose names match and which nobody uses.

    Without `parents`, those where temporary folders are made.
    """
    total = Removed(0, 0)
    for parent in dict.fromkeys(parents or places()):
        for path in _inside(parent):
            if re.fullmatch(pattern, path.name) and _is_ours(path):
                with _taken(path) as taken:
                    if taken:
                        total += Removed(1, size(path) if dry_run else remove(path))
    return total


def places() -> list[Path]:
    """Where this machine's temporary folders are made. Those of Ray need a short path."""
    return [Path(tempfile.gettempdir()), short_place()]


def short_place() -> Path:
    """A folder for Ray's sockets: their paths may have 107 bytes, and the names that Ray chooses take some 90."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(folder if len(os.fsencode(folder)) <= 16 else "/tmp")


@contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether nobody else uses the folder. If so, it is locked while the body runs."""
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
        taken = os.fstat(lock).st_nlink > 0  # 0: another process has just removed it
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
    """Whether the folder and everything in it are old, by the clock of its filesystem."""
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as new:
        newest = max(below.lstat().st_mtime for below in (path, *_inside(path)))
        return newest < os.fstat(new.fileno()).st_mtime - STALE_SECONDS
    return False


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; files that disappear meanwhile count as nothing."""
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

"""Finds the cause behind an exception of Python, Ray or a library, and turns it into one of our errors.

A full disk, a lack of memory or a lost cluster can show at any line, in any process, as many kinds of exception. All
code that recognises them is here. An exception that is not recognised is a bug.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from infra.errors import ClusterError, PixnerdError

AGAIN = "then run the same command again: it goes on from there"
_DISK = f"free some space there, or set TMPDIR to a folder of a larger disk; {AGAIN}"
_MEMORY = f"free memory, have fewer workers, or raise the limits (`ulimit -v`, a container's memory); {AGAIN}"
_THREADS = f"raise the limits (`ulimit -u`, `ulimit -v`, a container's pids); {AGAIN}"

# Messages and remedies by error number, and by texts of the C library, Python, PyTorch, Ray, SQLite and gRPC.
_FULL = "the disk is full", _DISK
_LACK = "there is too little memory, or too little address space", _MEMORY
_NUMBERS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: ("this user's share of the disk is full", _DISK),
    errno.EFBIG: ("a file may not become as large as it must", f"raise the limit (`ulimit -f`); {AGAIN}"),
    errno.ENOMEM: _LACK,
    errno.EMFILE: ("too many files are open", f"raise the limit (`ulimit -n`); {AGAIN}"),
    errno.ENFILE: ("too many files are open on this machine", f"raise `fs.file-max`, or close some; {AGAIN}"),
}
_PHRASES = {
    "No space left on device": _FULL,
    "database or disk is full": _FULL,
    "Disk quota exceeded": _NUMBERS[errno.EDQUOT],
    "File too large": _NUMBERS[errno.EFBIG],
    "Too many open files": _NUMBERS[errno.EMFILE],
    "can't start new thread": ("no more threads or processes may be started", _THREADS),
    "Resource temporarily unavailable": ("no more threads or processes may be started", _THREADS),
    "Cannot allocate memory": _LACK,
    "can't allocate memory": _LACK,
    "bad_alloc": _LACK,
    "failed to map segment": _LACK,
}


def explained(error: BaseException) -> PixnerdError | None:
    """The error of ours that this is, was raised from, or can be explained by; None if it is a bug."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, PixnerdError):
            return link
    if lack := exhausted(error):
        return lack
    for link in chain:
        if _is_of_ray(link) and not hasattr(link, "worker_failures"):
            return ClusterError(
                f"Ray cannot go on ({first_line(link)})", remedy="run the same command again: it goes on from there"
            )
    return None


def exhausted(error: BaseException) -> PixnerdError | None:
    """The lack of disk, memory, files or threads behind the error; None if there is none."""
    return next(filter(None, map(_exhausted, _chain(error))), None)


def known_phrase(text: str) -> PixnerdError | None:
    """The same, recognised by the texts of libraries."""
    for phrase, (message, remedy) in _PHRASES.items():
        if phrase in text:
            return PixnerdError(message, remedy=remedy)
    return None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, those that it was raised from, and those that Ray transferred from other processes."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        inner = [link.__cause__, getattr(link, "cause", None), *getattr(link, "worker_failures", {}).values()]
        if _is_of_ray(link):
            inner.append(link.__context__)
        waiting += [cause for cause in inner if isinstance(cause, BaseException)]


def _exhausted(error: BaseException) -> PixnerdError | None:
    name, of_ray = type(error).__name__, _is_of_ray(error)
    if isinstance(error, MemoryError) or (of_ray and name == "OutOfMemoryError"):
        return PixnerdError(_LACK[0], remedy=_LACK[1])
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        message, remedy = _NUMBERS[error.errno]
        where = f" ({error.filename})" if error.filename else ""
        return PixnerdError(f"{message}{where}", remedy=remedy)
    if of_ray and name in ("OutOfDiskError", "ObjectStoreFullError"):
        return PixnerdError(_FULL[0], remedy=_FULL[1])
    if (
        isinstance(error, OSError | RuntimeError | ImportError)  # a library may not fit in memory
        or of_ray
        or name in ("SafetensorError", "OperationalError")
    ):
        return known_phrase(str(error))
    return None


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"

"""What lies behind an error of Python's, of Ray's or of a library's: an error of ours, where one is known.

A full disk, a lack of memory or a cluster that is gone can show at any line, in any process, under many names. Here
they are recognised, once for all. What is not recognised is a bug.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from infra.errors import ClusterError, PixnerdError

AGAIN = "then run the same command again: it goes on from there"
_DISK = f"free some space there, or set TMPDIR to a folder of a larger disk; {AGAIN}"
_MEMORY = f"free memory, have fewer workers, or raise the limits (`ulimit -v`, a container's memory); {AGAIN}"
_THREADS = f"raise the limits (`ulimit -u`, `ulimit -v`, a container's pids); {AGAIN}"

# What went wrong, and what helps. The words are those of the C library, Python, PyTorch, Ray, SQLite and gRPC.
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
_WORDS = {
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
    """The error of ours that it is, that it was raised from, or that says what it is; None if it is a bug."""
    chain = list(_chain(error))
    for here in chain:
        if isinstance(here, PixnerdError):
            return here
    if found := exhausted(error):
        return found
    for here in chain:
        if _is_of_ray(here) and not hasattr(here, "worker_failures"):
            return ClusterError(
                f"Ray cannot go on ({first_line(here)})", remedy="run the same command again: it goes on from there"
            )
    return None


def exhausted(error: BaseException) -> PixnerdError | None:
    """What the machine has no more of, if that is behind the error."""
    return next(filter(None, map(_exhausted, _chain(error))), None)


def known_words(text: str) -> PixnerdError | None:
    """The same, by the words of whoever noticed it."""
    for words, (message, remedy) in _WORDS.items():
        if words in text:
            return PixnerdError(message, remedy=remedy)
    return None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, those that it was raised from, and those that Ray brought from other processes."""
    waiting, seen = [error], set[int]()
    while waiting:
        here = waiting.pop(0)
        if id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        inner = [here.__cause__, getattr(here, "cause", None), *getattr(here, "worker_failures", {}).values()]
        if _is_of_ray(here):
            inner.append(here.__context__)
        waiting += [found for found in inner if isinstance(found, BaseException)]


def _exhausted(error: BaseException) -> PixnerdError | None:
    if isinstance(error, MemoryError):
        return PixnerdError(_LACK[0], remedy=_LACK[1])
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        message, remedy = _NUMBERS[error.errno]
        where = f" ({error.filename})" if error.filename else ""
        return PixnerdError(f"{message}{where}", remedy=remedy)
    name = type(error).__name__
    if _is_of_ray(error) and name in ("OutOfDiskError", "ObjectStoreFullError"):
        return PixnerdError(_FULL[0], remedy=_FULL[1])
    if _is_of_ray(error) and name == "OutOfMemoryError":
        return PixnerdError(_LACK[0], remedy=_LACK[1])
    if (
        isinstance(error, OSError | RuntimeError | ImportError)  # of a library that cannot be mapped, for one
        or _is_of_ray(error)
        or name in ("SafetensorError", "OperationalError")
    ):
        return known_words(str(error))
    return None


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"

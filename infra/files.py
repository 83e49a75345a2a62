"""Local files: their hash and text, locking and flushing them, and writing them so that they appear whole or not."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import SettingsError

_LOCK_EVERY = 0.1  # seconds between two tries to lock a file


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """The text of a file that a user has named."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SettingsError(f"there is no file {path}", remedy="check the path") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror})", remedy="check the path") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text (byte {error.start})", remedy="save it as UTF-8") from None


def sync(path: Path) -> None:
    """Flush a file, or all files below a folder, to the disk."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Lock a file, or raise after so many seconds: flock by itself would wait without end.

    The kernel frees the lock when its process ends, in whatever way. The file stays.
    """
    deadline = time.monotonic() + seconds
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process still holds {path} after {seconds:g} s") from None
            time.sleep(_LOCK_EVERY)
        yield


@contextmanager
def appearing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary path for a file or a folder; after the body it is flushed to disk and moved to `path` in one step.

    After an error nothing of it is left. A folder can replace an empty folder only. A file replaces an existing one,
    unless `replace` is False.
    """
    path = path.absolute()
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as holder:
        unfinished = Path(holder) / path.name
        yield unfinished
        sync(unfinished)
        if not replace and path.is_file():
            raise FileExistsError("it is there by now")
        unfinished.replace(path)

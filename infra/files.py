"""Local files: their hash, flushing them to disk, and writing them so that they appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or all files below a folder, to the disk."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


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

"""Files of this machine: what they hold, told by a hash, and how they appear whole or not at all."""

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
    """A file, or all files below a folder, reach the disk before this returns."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextmanager
def appearing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A path to write a file or a folder at, which takes its real place in one step once all of it is on the disk.

    After an error nothing of it is left. A folder takes the place of an empty one at most, a file that of another file,
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

"""The files at a path that the user names (a folder, one file, a prefix of a store): their names and sizes only."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from data_prep.sources.base import FOREIGN, IMAGE_SUFFIXES, foreign
from data_prep.sources.folders import Folder, open_folder
from data_prep.sources.lines import SUFFIXES as TABLES
from data_prep.sources.packed import PACKINGS
from infra.errors import DataError, SettingsError

MOST_NAMES = 50_000  # files that are listed; the first ones of a larger corpus tell what it is
TARS = (".tar", ".tgz", ".tbz2", ".tzst", *(f".tar{packing}" for packing in PACKINGS))


class Place(NamedTuple):
    url: str  # of the folder: absolute, so that a recipe can be run from anywhere
    folder: Folder
    names: dict[str, int]  # of the files in the folder, or of the one file that the user named -> their sizes
    whole: bool  # whether `names` has all files
    path: str  # as the user wrote it

    def ending(self, suffixes: tuple[str, ...]) -> list[str]:
        return [name for name in self.names if name.lower().endswith(suffixes)]

    @property
    def tables(self) -> list[str]:
        return self.ending(TABLES)

    @property
    def tars(self) -> list[str]:
        return self.ending(TARS)

    @property
    def pictures(self) -> list[str]:
        return self.ending(IMAGE_SUFFIXES)

    def inside(self, folder: str) -> str:
        """The URL of a folder in this one."""
        return f"{self.url.rstrip('/')}/{folder}" if folder else self.url

    @property
    def is_store(self) -> bool:
        return "://" in self.url and not self.url.startswith("file:")


def place_at(path: str) -> Place:
    url, name = _folder_and_file(path)
    folder = open_folder(url)
    if name:
        with folder.open(name) as file:
            return Place(url, folder, {name: file.seek(0, io.SEEK_END)}, True, path)
    sizes = ((file.name, file.size) for file in folder.names() if not file.refused and not file.name.endswith("/"))
    names = dict(islice(sizes, MOST_NAMES + 1))
    whole = len(names) <= MOST_NAMES
    return Place(url, folder, dict(islice(names.items(), MOST_NAMES)), whole, path)


def _folder_and_file(path: str) -> tuple[str, str]:
    """The folder, and the name of a file in it or "": `s3://bucket/a/b.tar` gives `s3://bucket/a` and `b.tar`."""
    if urlsplit(path).scheme:
        if path.lower().endswith((*TABLES, *TARS, *FOREIGN)):
            parent, _, name = path.rpartition("/")
            return parent, name
        return path, ""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local.resolve()), ""
    if not local.exists():
        raise SettingsError(f"there is no {path}", remedy="name a folder, a tar, a table or a store's URL")
    return str(local.parent.resolve()), local.name


def nothing_at(place: Place) -> DataError:
    """The error for a place without a corpus: which files are there instead, and what can be done with them."""
    if not place.names:
        return DataError(f"{place.path} is empty", remedy="name the folder that holds the pictures")
    counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in place.names)
    suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(4))
    remedy = next(filter(None, map(foreign, place.names)), "")
    return DataError(
        f"{place.path} holds nothing that can be prepared ({suffixes})",
        remedy=remedy or "name a folder of pictures, tars, or tables: Parquet, JSON lines or arrays, CSV or TSV",
    )

"""What lies at a path that somebody points at: a folder, a file in one, or a prefix in a store; by names alone."""

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

MOST_NAMES = 50_000  # files that are looked at by name: of a larger corpus the first ones tell what it is
TARS = (".tar", ".tgz", ".tbz2", ".tzst", *(f".tar{packing}" for packing in PACKINGS))


class Place(NamedTuple):
    url: str  # of the folder: absolute, so that a recipe can be run from anywhere
    folder: Folder
    names: dict[str, int]  # of the files in it, or of the one that was pointed at, with their sizes
    whole: bool  # whether these are all
    given: str  # as it was asked for

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
        """The URL of a folder in it."""
        return f"{self.url.rstrip('/')}/{folder}" if folder else self.url

    @property
    def is_store(self) -> bool:
        return "://" in self.url and not self.url.startswith("file:")


def place_at(path: str) -> Place:
    url, only = _folder_and_file(path)
    folder = open_folder(url)
    if only:
        with folder.open(only) as file:
            return Place(url, folder, {only: file.seek(0, io.SEEK_END)}, True, path)
    found = ((file.name, file.size) for file in folder.names() if not file.refused and not file.name.endswith("/"))
    names = dict(islice(found, MOST_NAMES + 1))
    whole = len(names) <= MOST_NAMES
    return Place(url, folder, dict(islice(names.items(), MOST_NAMES)), whole, path)


def _folder_and_file(path: str) -> tuple[str, str]:
    if urlsplit(path).scheme:
        if path.lower().endswith((*TABLES, *TARS, *FOREIGN)):
            above, _, name = path.rpartition("/")
            return above, name
        return path, ""
    found = Path(path).expanduser()
    if found.is_dir():
        return str(found.resolve()), ""
    if not found.exists():
        raise SettingsError(f"there is no {path}", remedy="name a folder, a tar, a table or a store's URL")
    return str(found.parent.resolve()), found.name


def nothing_at(place: Place) -> DataError:
    """What is there instead of a corpus, and what can be made of it."""
    if not place.names:
        return DataError(f"{place.given} is empty", remedy="name the folder that holds the pictures")
    counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in place.names)
    there = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(4))
    remedy = next(filter(None, map(foreign, place.names)), "")
    return DataError(
        f"{place.given} holds nothing that can be prepared ({there})",
        remedy=remedy or "name a folder of pictures, tars, or tables: Parquet, JSON lines or arrays, CSV or TSV",
    )

"""The survey of a corpus for `pixnerd new`: its kind, the meaning of its columns, the size of its pictures.

    place        the files that are there, by name
    candidates   the result for one source: settings for a recipe, remarks, a sample of items
    pictures     folders of pictures with captions beside them, or in one folder for each class
    tables       tables that name, hold or link to pictures
    tars         WebDataset
    columns      which columns of a table are captions, URLs or names of files
    hosts        whether URLs lead into a private network

However large the corpus is, only some names, rows and pictures are read, and no item is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, NamedTuple

from data_prep.sources.base import foreign
from data_prep.survey import pictures, tables, tars
from data_prep.survey.candidates import Candidate
from data_prep.survey.hosts import Hosts, hosts_of
from data_prep.survey.place import Place, nothing_at, place_at
from data_prep.survey.tables import Wanted
from data_prep.web.addresses import Lookup, look_up
from infra.errors import DataError, SettingsError

__all__ = ["Hosts", "Survey", "Wanted", "name_of", "survey"]

KINDS = ("text_folder", "table_folder", "url_list", "parquet_images", "webdataset", "imagenet")


class Survey(NamedTuple):
    sources: list[dict[str, Any]]  # as a recipe has them
    remarks: list[dict[str, str]]  # of each source: setting -> a comment on it
    pictures: int
    counted: bool  # whether `pictures` is exact; else it is an estimate
    shorter_side: int | None  # which 90 % of the pictures reach; none: they must be downloaded first
    words: float  # of a caption, the median
    longest: int  # words, which 95 % of the captions do not exceed
    captions: list[str]  # a few of them
    hosts: Hosts | None  # of a list of URLs
    warnings: list[str]


def survey(path: str, wanted: Wanted = Wanted(), lookup: Lookup = look_up) -> Survey:
    if wanted.kind is not None and wanted.kind not in KINDS:
        raise SettingsError(f"`{wanted.kind}` is no kind of corpus that can be found", remedy=f"{', '.join(KINDS)}")
    place = place_at(path)
    chosen = _chosen(place, wanted)
    sides = [min(side) for candidate in chosen for side in candidate.picture_sides(place.path)]
    urls = [url for candidate in chosen for url in candidate.urls]
    captions = [caption for candidate in chosen for caption in candidate.captions]
    lengths = sorted(len(caption.split()) for caption in captions) or [0]
    named = zip(_names(place, chosen), [candidate.source for candidate in chosen], strict=True)
    return Survey(
        sources=[{"kind": source["kind"], "name": name, **source} for name, source in named],
        remarks=[candidate.remarks for candidate in chosen],
        pictures=sum(candidate.rows for candidate in chosen),
        counted=all(candidate.counted for candidate in chosen),
        shorter_side=sorted(sides)[len(sides) // 10] if sides else None,
        words=round(median(lengths), 1),
        longest=lengths[int(0.95 * (len(lengths) - 1))],
        captions=captions[:3],
        hosts=hosts_of(urls, lookup) if urls else None,
        warnings=[warning for candidate in chosen for warning in candidate.warnings],
    )


def _chosen(place: Place, wanted: Wanted) -> list[Candidate]:
    """The candidates, which must all be of one kind; an error if there are none."""
    candidates: list[Candidate] = []
    problems: list[DataError] = []
    for kinds, files, candidates_in in (
        (("webdataset",), place.tars, tars.candidates_in),
        (("table_folder", "url_list", "parquet_images"), place.tables, tables.candidates_in),
        (("text_folder", "imagenet"), place.pictures, pictures.candidates_in),
    ):
        if files and wanted.kind in (None, *kinds):
            try:
                candidates += candidates_in(place, wanted)
            except DataError as error:
                problems.append(error)
    kinds_found = list(dict.fromkeys(candidate.kind for candidate in candidates))
    if set(kinds_found) == {"table_folder", "imagenet"}:  # the table says more than the names of folders
        return [candidate for candidate in candidates if candidate.kind == "table_folder"]
    if len(kinds_found) > 1:
        several = "; ".join(f"{candidate.kind}: {_files_of(candidate)}" for candidate in candidates)
        raise SettingsError(
            f"{place.path} holds several corpora ({several})",
            remedy=f"say which: --kind {' or --kind '.join(kinds_found)}; or name a folder or file in it",
        )
    if candidates:
        return candidates
    if problems:
        raise problems[0]
    if place.pictures and wanted.kind in (None, "text_folder", "table_folder"):
        raise pictures.without_captions(place)
    if place.tables and wanted.kind is None and not any(map(foreign, place.names)):
        raise DataError(
            f"no table of {place.path} names, holds or links to pictures ({', '.join(place.tables[:3])})",
            remedy="name the column: --image COLUMN; pictures that it names must lie in the same folder",
        )
    if wanted.kind is not None and place.names:
        raise DataError(f"{place.path} is no {wanted.kind}", remedy="leave --kind out: what is there is found")
    raise nothing_at(place)


def _files_of(candidate: Candidate) -> str:
    files = candidate.source.get("tables") or candidate.source.get("tars") or [f"{candidate.rows:,} pictures"]
    return ", ".join(map(str, files[:2])) + (", ..." if len(files) > 2 else "")


def _names(place: Place, candidates: list[Candidate]) -> list[str]:
    """A valid name for each source, no two alike."""
    whole = name_of(place.path)
    if len(candidates) == 1:
        return [whole]
    names: list[str] = []
    for number, candidate in enumerate(candidates):
        last = _plain(PurePosixPath(str(candidate.source["url"])).name)
        names.append(last if last and last not in names and last != whole else f"{whole}-{number + 1}")
    return names


def name_of(path: str) -> str:
    """A valid name for the corpus at a path: `/data/My photos (2024)/` gives `My-photos-2024`."""
    last = PurePosixPath(path.rstrip("/")).name if "://" in path else Path(path).expanduser().resolve().name
    return _plain(last.partition(".")[0]) or "mine"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60]

"""`pixnerd new` looks at a corpus: what kind it is, which columns are what, how large its pictures are.

    place       what lies there, by names
    pictures    folders of pictures with captions beside them, or in folders of classes
    tables      tables that name, hold or link to pictures
    tars        WebDataset
    columns     which of a table's columns is what
    hosts       whether URLs lead into a network of one's own

Only some names, rows and pictures are read, however large the corpus is, and nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any, NamedTuple

from data_prep.sources.base import foreign
from data_prep.survey import pictures, tables, tars
from data_prep.survey.hosts import Hosts, hosts_of
from data_prep.survey.place import Place, nothing_at, place_at
from data_prep.survey.seen import Seen
from data_prep.survey.tables import Wanted
from data_prep.web.addresses import Lookup, look_up
from infra.errors import DataError, SettingsError

__all__ = ["Hosts", "Survey", "Wanted", "name_of", "survey"]

KINDS = ("text_folder", "table_folder", "url_list", "parquet_images", "webdataset", "imagenet")


class Survey(NamedTuple):
    sources: list[dict[str, Any]]  # as a recipe has them
    remarks: list[dict[str, str]]  # of each source: a setting -> what to know about it
    pictures: int  # as far as that is known
    counted: bool
    shorter_side: int | None  # of most pictures at least; none: they must be downloaded first
    words: float  # of a caption, on average
    longest: int  # words, of nearly all captions at most
    captions: list[str]  # some of them
    hosts: Hosts | None  # of a list of URLs
    warnings: list[str]


def survey(path: str, wanted: Wanted = Wanted(), lookup: Lookup = look_up) -> Survey:
    if wanted.kind is not None and wanted.kind not in KINDS:
        raise SettingsError(f"`{wanted.kind}` is no kind of corpus that can be found", remedy=f"{', '.join(KINDS)}")
    place = place_at(path)
    seen = _chosen(place, wanted)
    sides = [min(side) for one in seen for side in one.check_pictures(place.given)]
    urls = [url for one in seen for url in one.urls]
    said = [text for one in seen for text in one.captions]
    lengths = sorted(len(text.split()) for text in said) or [0]
    names = _names(place, seen)
    return Survey(
        sources=[
            {"kind": one.source["kind"], "name": name, **one.source} for one, name in zip(seen, names, strict=True)
        ],
        remarks=[one.remarks for one in seen],
        pictures=sum(one.rows for one in seen),
        counted=all(one.counted for one in seen),
        shorter_side=sorted(sides)[len(sides) // 10] if sides else None,
        words=round(median(lengths), 1),
        longest=lengths[int(0.95 * (len(lengths) - 1))],
        captions=said[:3],
        hosts=hosts_of(urls, lookup) if urls else None,
        warnings=[warning for one in seen for warning in one.warnings],
    )


def _chosen(place: Place, wanted: Wanted) -> list[Seen]:
    """What lies there, if it is one thing."""
    found: list[Seen] = []
    problems: list[DataError] = []
    for kinds, there, look in (
        (("webdataset",), place.tars, tars.seen_in),
        (("table_folder", "url_list", "parquet_images"), place.tables, tables.seen_in),
        (("text_folder", "imagenet"), place.pictures, pictures.seen_in),
    ):
        if there and wanted.kind in (None, *kinds):
            try:
                found += look(place, wanted)
            except DataError as error:
                problems.append(error)
    names = list(dict.fromkeys(str(one.source["kind"]) for one in found))
    if set(names) == {"table_folder", "imagenet"}:  # the table says more than the names of folders
        return [one for one in found if one.source["kind"] == "table_folder"]
    if len(names) > 1:
        several = "; ".join(f"{kind}: {_what(one)}" for one in found for kind in [one.source["kind"]])
        raise SettingsError(
            f"{place.given} holds several corpora ({several})",
            remedy=f"say which: --kind {' or --kind '.join(names)}; or name a folder or file in it",
        )
    if found:
        return found
    if problems:
        raise problems[0]
    if place.pictures and wanted.kind in (None, "text_folder", "table_folder"):
        raise pictures.without_captions(place)
    if place.tables and wanted.kind is None and not any(map(foreign, place.names)):
        raise DataError(
            f"no table of {place.given} names, holds or links to pictures ({', '.join(place.tables[:3])})",
            remedy="name the column: --image COLUMN; pictures that it names must lie in the same folder",
        )
    if wanted.kind is not None and place.names:
        raise DataError(f"{place.given} is no {wanted.kind}", remedy="leave --kind out: what is there is found")
    raise nothing_at(place)


def _what(seen: Seen) -> str:
    named = seen.source.get("tables") or seen.source.get("tars") or [f"{seen.rows:,} pictures"]
    return ", ".join(map(str, named[:2])) + (", ..." if len(named) > 2 else "")


def _names(place: Place, seen: list[Seen]) -> list[str]:
    """A name for each source, of letters that names may have, no two alike."""
    whole = name_of(place.given)
    if len(seen) == 1:
        return [whole]
    names: list[str] = []
    for number, one in enumerate(seen):
        last = _plain(PurePosixPath(str(one.source["url"])).name)
        names.append(last if last and last not in names and last != whole else f"{whole}-{number + 1}")
    return names


def name_of(path: str) -> str:
    """What a corpus may be called by where it lies: letters that names may have."""
    last = PurePosixPath(path.rstrip("/")).name if "://" in path else Path(path).expanduser().resolve().name
    return _plain(last.partition(".")[0]) or "mine"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60]

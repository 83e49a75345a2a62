"""Surveys tables: which column names, holds or links to the pictures, and which ones are captions."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.images.decode import sniff
from data_prep.rejections import Cause, Rejection
from data_prep.sources import parquet, words
from data_prep.sources.base import missing_column
from data_prep.sources.fields import element, field, flat, is_list, leaves
from data_prep.sources.folders import open_folder
from data_prep.sources.lines import ending_of, is_array, is_parquet, kind_of, lines
from data_prep.sources.packed import Unpacked, packing_of
from data_prep.survey.candidates import PICTURES, ROWS, Candidate, files_needed, first, spread
from data_prep.survey.columns import captions_of, files_in, is_header, texts_in, urls_in
from data_prep.survey.place import Place
from infra.errors import DataError, SettingsError

MOST_GROUPS = 8  # groups of tables, those of one folder and suffix, of which the first table is read
MOST_BYTES = 64 << 20  # of a picture
_TRIED = 20  # names of pictures that are looked for
_MOST_ARRAYS = 64  # .json files that are opened, since most of them are no tables


class Wanted(NamedTuple):
    """What the user has said about the corpus already."""

    kind: str | None = None
    image: str | None = None
    captions: tuple[str, ...] = ()


class _Table(NamedTuple):
    """Some rows of a table."""

    name: str
    columns: list[str]
    embedded: list[str]  # columns that hold pictures
    rows: Sequence[Mapping[str, Any]]
    size: int  # the number of rows: counted, or an estimate
    counted: bool
    header: list[str]  # made-up names of the columns, if the table has none


def candidates_in(place: Place, wanted: Wanted) -> list[Candidate]:
    """One for each group of tables that have pictures; other tables are left out."""
    candidates = []
    for names in _groups(place):
        table = _read(place, names[0])
        _check_wanted(table, wanted)
        candidate = _candidate(place, names, table, wanted)
        if candidate is not None and wanted.kind in (None, candidate.kind):
            candidates.append(candidate)
    return candidates


def _groups(place: Place) -> list[list[str]]:
    """The tables by folder and suffix: those of a group are taken to be alike."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in place.tables:
        groups[str(PurePosixPath(name).parent), ending_of(name).lower()].append(name)
    arrays = [names for names in groups.values() if kind_of(names[0]) == ".json"]
    others = [names for names in groups.values() if kind_of(names[0]) != ".json"]
    tables = (names for names in arrays[:_MOST_ARRAYS] if is_array(place.folder, names[0]))
    return first([*others, *tables], MOST_GROUPS)


def _check_wanted(table: _Table, wanted: Wanted) -> None:
    for column in (*wanted.captions, *((wanted.image,) if wanted.image else ())):
        if column not in [*table.columns, *table.embedded]:
            raise missing_column(table.name, column, [*table.columns, *table.embedded])


def _candidate(place: Place, names: list[str], table: _Table, wanted: Wanted) -> Candidate | None:
    embedded = [name for name in table.embedded if wanted.image in (None, name)]
    if embedded:
        return _holding(place, names, table, embedded[0], wanted)
    columns = [wanted.image] if wanted.image else table.columns
    if urls := urls_in(table.rows, columns):
        return _linking(place, names, table, urls, wanted)
    for column in [wanted.image] if wanted.image else files_in(table.rows, columns):
        if (base := _picture_folder(place, table, column)) is not None:
            return _naming(place, names, table, column, base, wanted)
    return None


# Reading some rows


def _read(place: Place, name: str) -> _Table:
    if is_parquet(name):
        return _read_parquet(place, name)
    header: list[str] = []
    rows = _rows(place, name, header)
    if rows and kind_of(name) in (".csv", ".tsv") and not is_header(list(rows[0])):
        header = [f"column{number + 1}" for number in range(len(rows[0]))]
        rows = _rows(place, name, header)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    size = sum(len(str(value)) + 1 for row in rows for value in row.values())
    whole = len(rows) < ROWS
    count = len(rows) if whole else round(_unpacked_size(place, name) * len(rows) / max(1, size))
    return _Table(name, columns, [], rows, count, whole, header)


def _rows(place: Place, name: str, header: Sequence[str]) -> list[dict[str, Any]]:
    return [flat(row) for row in first(lines(place.folder, name, header), ROWS) if isinstance(row, dict)]


def _unpacked_size(place: Place, name: str) -> float:
    """The size of a table in bytes; that of a compressed one is estimated from its first megabyte."""
    size = place.names[name]
    if not packing_of(name):
        return size
    with place.folder.open(name) as file:
        unpacked = Unpacked(file, packing_of(name), name)
        io.BufferedReader(unpacked).read(1 << 20)
        return size * unpacked.times


def _read_parquet(place: Place, name: str) -> _Table:
    with parquet.opened(place.folder.open(name), name) as file:
        schema = file.schema_arrow
        binary = [column.name + ".0" * is_list(column.type) for column in schema if _may_hold(element(column.type))]
        nested = [leaf for column in schema for leaf in leaves(column.type, column.name)]
        plain = [leaf for leaf, kind in nested if parquet.plain_type(kind) is not None and not _is_in(binary, leaf)]
        rows = [flat(row) for row in _first_rows(file, name, plain, ROWS)]
        for number, row in enumerate(_first_rows(file, name, binary, PICTURES)):
            if number == len(rows):
                rows.append({})
            rows[number] |= row
    embedded = [column for column in binary if _holds(rows[:PICTURES], column)]
    return _Table(name, plain, embedded, rows, file.metadata.num_rows, True, [])


def _first_rows(file: Any, name: str, columns: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The first rows that can be read."""
    rows: list[dict[str, Any]] = []
    for batch in parquet.batches(file, name, columns, most) if columns else ():
        if isinstance(batch, pa.Table):
            rows += parquet.unchecked(batch.slice(0, most - len(rows))).to_pylist()
        if len(rows) >= most:
            break
    return rows


def _may_hold(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold pictures: bytes, or a struct with `bytes`."""
    if pa.types.is_struct(kind):
        return any(inner.name == "bytes" and parquet.is_bytes(inner.type) for inner in kind)
    return parquet.is_bytes(kind)


def _is_in(columns: Sequence[str], leaf: str) -> bool:
    """Whether a leaf, such as `image.bytes`, is one of the columns or a field of one."""
    return any(leaf == name or leaf.startswith(f"{name}.") for name in (name.removesuffix(".0") for name in columns))


def _holds(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether the column holds pictures: their bytes, or Hugging Face's struct of `bytes` and `path`."""
    values = [value for row in rows if (value := field(row, column)) is not None]
    return any(isinstance(value, dict) or (isinstance(value, bytes) and sniff(value)) for value in values)


# The three kinds: tables that hold, link to, or name pictures


def _holding(place: Place, names: list[str], table: _Table, column: str, wanted: Wanted) -> Candidate:
    values = [value for row in table.rows[:PICTURES] if (value := field(row, column)) is not None]
    pairs = [value if isinstance(value, dict) else {"bytes": value} for value in values]
    source = {"kind": "parquet_images", "url": place.url, "image": column}
    first_of = "the first picture of each row, in " if column.endswith(".0") else ""
    remarks = {"image": f"{first_of}the column that holds the pictures"}
    images: list[bytes | Rejection] = [pair["bytes"] for pair in pairs if pair["bytes"]]
    if not images:
        paths = [path for pair in pairs if (path := words.text(pair.get("path")))]
        source["files"], images = _read_paths(place, table, paths)
        remarks["files"] = "the rows hold no bytes, only the paths of pictures in this folder"
    return _finished(place, names, table, source, remarks, [column], wanted, pictures=images)


def _linking(place: Place, names: list[str], table: _Table, columns: list[str], wanted: Wanted) -> Candidate:
    source = {"kind": "url_list", "url": place.url, "image": columns[0]}
    also = f"; also there: {', '.join(columns[1:])}" if columns[1:] else ""
    remarks = {"image": f"the column of URLs{also}"}
    return _finished(place, names, table, source, remarks, columns, wanted, urls=texts_in(table.rows, columns[0]))


def _naming(place: Place, names: list[str], table: _Table, column: str, base: str, wanted: Wanted) -> Candidate:
    source = {"kind": "table_folder", "url": place.inside(base), "image": column}
    remarks = {"image": "the column that names the pictures, as they are called in the folder"}
    sample = spread(texts_in(table.rows, column), PICTURES)
    images = [place.folder.read(_joined(base, name), MOST_BYTES) for name in sample]
    present: list[bytes | Rejection] = [image for image in images if not _is_missing(image)]
    missing = len(images) - len(present)
    warnings = [f"{missing} of {len(images)} pictures that {table.name} names are not there"] if missing else []
    return _finished(
        place, names, table, source, remarks, [column], wanted, base=base, pictures=present, warnings=warnings
    )


def _finished(
    place: Place,
    names: list[str],
    table: _Table,
    source: dict[str, Any],
    remarks: dict[str, str],
    taken: Sequence[str],
    wanted: Wanted,
    *,
    base: str = "",
    **more: Any,
) -> Candidate:
    """Complete the source's settings by captions, tables and header; `base` is the folder of the pictures."""
    captions = captions_of(table.rows, [name for name in table.columns if name not in taken])
    chosen = list(wanted.captions) or captions.chosen
    if not chosen:
        columns = ", ".join(table.columns) or "none"
        raise DataError(
            f"no column of {table.name} looks like captions (its columns: {columns})",
            remedy="name it: --captions COLUMN",
        )
    others = [name for name in captions.others if name not in chosen]
    if others:
        remarks["captions"] = f"other columns of text: {', '.join(others)}"
    needed = files_needed(len(names), table.size)
    source |= {"tables": [_from(place, base, name) for name in names[:needed]], "captions": chosen}
    if table.header:
        source["header"] = table.header
        remarks["header"] = f"{table.name} does not begin with the names of its columns: these are made up"
    if needed < len(names):
        everything = f"{PurePosixPath(_from(place, base, names[0])).parent}/*{ending_of(names[0])}"
        remarks["tables"] = f"{needed} of {len(names):,}, enough for a first model; all of them: [{everything!r}]"
    elif len(names) > 1:
        source["tables"] = [f"{PurePosixPath(source['tables'][0]).parent}/*{ending_of(names[0])}"]
    source["tables"] = [name.removeprefix("./") for name in source["tables"]]
    counted = table.counted and len(names) == 1
    return Candidate(source, texts_in(table.rows, *chosen), needed * table.size, counted, remarks=remarks, **more)


def _from(place: Place, base: str, name: str) -> str:
    """The path of a table relative to the folder of the pictures."""
    if not base:
        return name
    if name.startswith(f"{base}/"):
        return name.removeprefix(f"{base}/")
    if place.is_store:
        raise SettingsError(
            f"{name} names pictures that lie in {base}, beside it and not below",
            remedy="put the table into the folder of the pictures, or write longer names into it",
        )
    return str(Path(place.url, name))  # a table that is named by its path may lie outside of that folder


# Where the pictures are


def _picture_folder(place: Place, table: _Table, column: str) -> str | None:
    """The folder to which a column's names of pictures are relative: that in which most of them exist."""
    sample = spread(texts_in(table.rows, column), _TRIED)
    beside = str(PurePosixPath(table.name).parent)
    folders = [beside if beside != "." else "", "", *(name.rpartition("/")[0] for name in place.pictures)]
    best, most = None, 0
    for base in list(dict.fromkeys(folders))[:64]:
        hits = sum(_is_there(place, _joined(base, name)) for name in sample)
        if hits > most:
            best, most = base, hits
    return best


def _joined(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name


def _is_there(place: Place, name: str) -> bool:
    if os.path.normpath(name) in place.names:
        return True
    return not place.whole and not _is_missing(place.folder.read(name, 1))


def _is_missing(image: bytes | Rejection) -> bool:
    return isinstance(image, Rejection) and image.cause is not Cause.TOO_MANY_BYTES


def _read_paths(place: Place, table: _Table, paths: Sequence[str]) -> tuple[str, list[bytes | Rejection]]:
    """The folder to which a Parquet file's paths of pictures lead, and these pictures."""
    absolute = paths and all(os.path.isabs(path) for path in paths)
    url = os.path.commonpath([os.path.dirname(path) for path in paths]) if absolute else place.url
    names = [os.path.relpath(path, url) if absolute else path for path in paths]
    present = False
    with suppress(SettingsError):
        folder = open_folder(url)
        present = any(not _is_missing(folder.read(name, 1)) for name in names)
    if present:
        return url, [folder.read(name, MOST_BYTES) for name in names]
    raise DataError(
        f"the rows of {table.name} hold no pictures, only paths such as {paths[0] if paths else 'none'}, which are "
        "not there",
        remedy="bring the files there, or write the table with their bytes (datasets: push_to_hub, or "
        "embed_table_storage before to_parquet)",
    )

"""Tables looked at: which column names, holds or links to the pictures, and which ones say what is in them."""

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
from data_prep.sources.lines import ending_of, is_array, is_parquet, kind_of, lines
from data_prep.sources.packed import Unpacked, packing_of
from data_prep.survey.columns import captions_of, files_in, is_header, texts_of, urls_in
from data_prep.survey.place import Place
from data_prep.survey.seen import ENOUGH, PICTURES, ROWS, Seen, first, spread
from infra.errors import DataError, SettingsError

MOST_GROUPS = 8  # tables of one folder and suffix are alike; of so many kinds one of each is looked at
MOST_BYTES = 64 << 20  # of a picture
_TRIED = 20  # names of pictures that are looked for
_MOST_ARRAYS = 64  # files called .json that are looked into, since most are no tables


class Wanted(NamedTuple):
    """What whoever asks knows already."""

    kind: str | None = None
    image: str | None = None
    captions: tuple[str, ...] = ()


class _Table(NamedTuple):
    """Some rows of a table."""

    name: str
    columns: list[str]
    embedded: list[str]  # columns that hold pictures
    rows: Sequence[Mapping[str, Any]]
    size: int  # in rows
    counted: bool
    header: list[str]  # made up, where the table does not name its columns


def seen_in(place: Place, wanted: Wanted) -> list[Seen]:
    """One for each kind of table that pictures can be had from; those of the others are left out."""
    found = []
    for names in _groups(place):
        table = _read(place, names[0])
        _check_wanted(table, wanted)
        seen = _seen(place, names, table, wanted)
        if seen is not None and wanted.kind in (None, seen.source["kind"]):
            found.append(seen)
    return found


def _groups(place: Place) -> list[list[str]]:
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


def _seen(place: Place, names: list[str], table: _Table, wanted: Wanted) -> Seen | None:
    embedded = [name for name in table.embedded if wanted.image in (None, name)]
    if embedded:
        return _holding(place, names, table, embedded[0], wanted)
    columns = [wanted.image] if wanted.image else table.columns
    if urls := urls_in(table.rows, columns):
        return _linking(place, names, table, urls, wanted)
    for column in [wanted.image] if wanted.image else files_in(table.rows, columns):
        if (base := _base(place, table, column)) is not None:
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
    """Of a packed table it is guessed from its first megabyte."""
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
        held = [column.name + ".0" * is_list(column.type) for column in schema if _may_hold(element(column.type))]
        nested = [leaf for column in schema for leaf in leaves(column.type, column.name)]
        plain = [leaf for leaf, kind in nested if parquet.plain_type(kind) is not None and not _is_in(held, leaf)]
        rows = [flat(row) for row in _first_rows(file, name, plain, ROWS)]
        for number, row in enumerate(_first_rows(file, name, held, PICTURES)):
            if number == len(rows):
                rows.append({})
            rows[number] |= row
    embedded = [column for column in held if _holds(rows[:PICTURES], column)]
    return _Table(name, plain, embedded, rows, file.metadata.num_rows, True, [])


def _first_rows(file: Any, name: str, columns: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Of those that can be read."""
    found: list[dict[str, Any]] = []
    for batch in parquet.batches(file, name, columns, most) if columns else ():
        if isinstance(batch, pa.Table):
            found += parquet.unchecked(batch.slice(0, most - len(found))).to_pylist()
        if len(found) >= most:
            break
    return found


def _may_hold(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(inner.name == "bytes" and parquet.is_bytes(inner.type) for inner in kind)
    return parquet.is_bytes(kind)


def _is_in(held: Sequence[str], leaf: str) -> bool:
    return any(leaf == name or leaf.startswith(f"{name}.") for name in (name.removesuffix(".0") for name in held))


def _holds(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether the bytes are pictures', or the struct is the one in which Hugging Face keeps those."""
    values = [value for row in rows if (value := field(row, column)) is not None]
    return any(isinstance(value, dict) or (isinstance(value, bytes) and sniff(value)) for value in values)


# The three kinds


def _holding(place: Place, names: list[str], table: _Table, column: str, wanted: Wanted) -> Seen:
    values = [value for row in table.rows[:PICTURES] if (value := field(row, column)) is not None]
    pairs = [value if isinstance(value, dict) else {"bytes": value} for value in values]
    source = {"kind": "parquet_images", "url": place.url, "image": column}
    first_of = "the first picture of each row, in " if column.endswith(".0") else ""
    remarks = {"image": f"{first_of}the column that holds the pictures"}
    images: list[bytes | Rejection] = [pair["bytes"] for pair in pairs if pair["bytes"]]
    if not images:
        files = _files(place, table, [words.text(pair.get("path")) or "" for pair in pairs])
        source["files"] = files.url
        remarks["files"] = "the rows hold no bytes, only the paths of pictures in this folder"
        images = [files.folder.read(name, MOST_BYTES) for name in files.names]
    return _finished(place, names, table, source, remarks, [column], wanted, pictures=images)


def _linking(place: Place, names: list[str], table: _Table, urls: list[str], wanted: Wanted) -> Seen:
    source = {"kind": "url_list", "url": place.url, "image": urls[0]}
    also = f"; also there: {', '.join(urls[1:])}" if urls[1:] else ""
    asked = [text for row in table.rows for text in texts_of(row.get(urls[0]))]
    remarks = {"image": f"the column of URLs{also}"}
    return _finished(place, names, table, source, remarks, urls, wanted, urls=asked)


def _naming(place: Place, names: list[str], table: _Table, column: str, base: str, wanted: Wanted) -> Seen:
    source = {"kind": "table_folder", "url": place.inside(base), "image": column}
    remarks = {"image": "the column that names the pictures, as they are called in the folder"}
    said = [text for row in table.rows for text in texts_of(row.get(column))]
    images = [place.folder.read(f"{base}/{name}" if base else name, MOST_BYTES) for name in spread(said, PICTURES)]
    there: list[bytes | Rejection] = [image for image in images if not _is_missing(image)]
    missing = len(images) - len(there)
    warnings = [f"{missing} of {len(images)} pictures that {table.name} names are not there"] if missing else []
    return _finished(
        place, names, table, source, remarks, [column], wanted, base=base, pictures=there, warnings=warnings
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
) -> Seen:
    found = captions_of(table.rows, [name for name in table.columns if name not in taken])
    chosen = list(wanted.captions) or found.chosen
    if not chosen:
        texts = ", ".join(table.columns) or "none"
        raise DataError(
            f"no column of {table.name} looks like captions (its columns: {texts})",
            remedy="name it: --captions COLUMN",
        )
    others = [name for name in found.others if name not in chosen]
    if others:
        remarks["captions"] = f"other columns of text: {', '.join(others)}"
    some, rows = _some_of(names, table)
    source |= {"tables": [_from(place, base, name) for name in some], "captions": chosen}
    if table.header:
        source["header"] = table.header
        remarks["header"] = f"{table.name} does not begin with the names of its columns: these are made up"
    if len(some) < len(names):
        everything = f"{PurePosixPath(_from(place, base, names[0])).parent}/*{ending_of(names[0])}"
        remarks["tables"] = f"{len(some)} of {len(names):,}, enough for a first model; all of them: [{everything!r}]"
    elif len(names) > 1:
        source["tables"] = [f"{PurePosixPath(source['tables'][0]).parent}/*{ending_of(names[0])}"]
    source["tables"] = [name.removeprefix("./") for name in source["tables"]]
    said = [text for row in table.rows for column in chosen for text in texts_of(row.get(column))]
    return Seen(source, said, rows, table.counted and len(names) == 1, remarks=remarks, **more)


def _some_of(names: list[str], table: _Table) -> tuple[list[str], int]:
    """As many tables as it takes to have enough rows, where they are as long as the first one."""
    needed = min(len(names), max(1, -(-ENOUGH // max(1, table.size))))
    return names[:needed], needed * table.size


def _from(place: Place, base: str, name: str) -> str:
    """A table's name as it is found from the folder of the pictures."""
    if not base:
        return name
    if name.startswith(f"{base}/"):
        return name.removeprefix(f"{base}/")
    if place.is_store:
        raise SettingsError(
            f"{name} names pictures that lie in {base}, beside it and not below",
            remedy="put the table into the folder of the pictures, or write longer names into it",
        )
    return str(Path(place.url, name))  # a file that somebody names may lie elsewhere


# Where the pictures are


def _base(place: Place, table: _Table, column: str) -> str | None:
    """The folder from which a column's names lead to pictures."""
    said = spread([text for row in table.rows for text in texts_of(row.get(column))], _TRIED)
    above = str(PurePosixPath(table.name).parent)
    folders = [above if above != "." else "", "", *dict.fromkeys(_folder_of(name) for name in place.pictures)]
    best, hits = None, 0
    for base in list(dict.fromkeys(folders))[:64]:
        here = sum(_is_there(place, f"{base}/{name}" if base else name) for name in said)
        if here > hits:
            best, hits = base, here
    return best


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _is_there(place: Place, name: str) -> bool:
    if os.path.normpath(name) in place.names:
        return True
    return not place.whole and not _is_missing(place.folder.read(name, 1))


def _is_missing(image: bytes | Rejection) -> bool:
    return isinstance(image, Rejection) and image.cause is not Cause.TOO_MANY_BYTES


class _Files(NamedTuple):
    url: str
    folder: Any
    names: list[str]


def _files(place: Place, table: _Table, paths: Sequence[str]) -> _Files:
    """The folder that the paths of a Parquet lead to, and the paths from there."""
    from data_prep.sources.folders import open_folder

    named = [path for path in paths if path]
    absolute = named and all(os.path.isabs(path) for path in named)
    url = os.path.commonpath([os.path.dirname(path) for path in named]) if absolute else place.url
    with suppress(SettingsError):
        folder = open_folder(url)
        names = [os.path.relpath(path, url) if absolute else path for path in named]
        if any(not _is_missing(folder.read(name, 1)) for name in names):
            return _Files(url, folder, names)
    raise DataError(
        f"the rows of {table.name} hold no pictures, only paths such as {named[0] if named else 'none'}, which are "
        "not there",
        remedy="bring the files there, or write the table with their bytes (datasets: push_to_hub, or "
        "embed_table_storage before to_parquet)",
    )

"""Tables of text -> Parquet in the store, row by row: a table of 45 million rows needs no more memory than one of a
thousand.

A kept column has one type in the whole table, found in a first pass over all of it. A line that cannot be read becomes
a row of nothing which says why, and is refused and counted like any other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.rejections import Rejection
from data_prep.sources.base import DAMAGE, missing_column
from data_prep.sources.fields import field, listed
from data_prep.sources.folders import Folder
from data_prep.sources.lines import Line, kind_of, lines
from data_prep.sources.parquet import RowWriter
from infra import layout
from infra.errors import DataError
from infra.records import DataObject, put_data
from infra.store import Store

MOST_FIELDS = 1000  # names that a table's lines may have, all in all


class Columns(NamedTuple):
    """What is wanted of a table."""

    subject: list[str]  # images or ids, whose type is not checked here
    texts: list[str]
    captions: list[str]  # texts, or lists of them
    kept: list[str]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.subject, *self.texts, *self.captions, *self.kept]))


def converted(
    store: Store, source: str, folder: Folder, name: str, columns: Columns, header: Sequence[str] = ()
) -> tuple[DataObject, int] | None:
    """The wanted columns of a table as a Parquet in the store, and its rows; None where it has none."""
    schema = _schema(lines(folder, name, header), name, columns)
    if schema is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "rows.parquet")
        with RowWriter(path, schema.append(pa.field(DAMAGE, pa.string()))) as writer:
            casts = [(column.name, _CASTS[str(column.type)]) for column in schema]
            nothing = [None] * len(casts)
            for line in lines(folder, name, header):
                if isinstance(line, Rejection):
                    writer.add([*nothing, line.detail])
                else:
                    writer.add([*(cast(field(line, column)) for column, cast in casts), None])
        return put_data(store, layout.TABLES.at(), f"{source}.parquet", path), writer.rows


# Types


def _schema(found: Iterator[Line], name: str, columns: Columns) -> pa.Schema | None:
    """One type for a kept column, from all its values. Without kept columns the first lines tell what there is.

    None for a table without lines. A column without values has the type null, which goes with any other table's.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns.kept, pa.null())
    fields: dict[str, None] = {}
    missing = dict.fromkeys(columns.names)
    csv_text = kind_of(name) in (".csv", ".tsv")
    rows = 0
    for line in found:
        rows += 1
        if isinstance(line, Rejection):
            continue
        if len(fields) < MOST_FIELDS:
            fields.update(dict.fromkeys(line))
        for column in [column for column in missing if column in line or field(line, column) is not None]:
            del missing[column]
        for column in columns.kept:
            types[column] = _wider(types[column], field(line, column), csv_text=csv_text)
        if not columns.kept and not missing:
            break
    if not rows:
        return None
    if not fields:
        raise DataError(f"{name} is not a readable table (no row in it can be read)", remedy="write it again")
    for column in missing:
        raise missing_column(name, column, list(fields))
    whole = dict.fromkeys(columns.captions, pa.list_(pa.binary()))
    whole |= dict.fromkeys([*columns.subject, *columns.texts], pa.binary())
    whole |= types
    return pa.schema([(column, whole[column]) for column in columns.names])


def _wider(kind: pa.DataType, value: Any, *, csv_text: bool) -> pa.DataType:
    """The narrowest of the index's types that holds both; text holds everything."""
    if kind == pa.string():
        return kind
    here = _type(_csv_value(value) if csv_text else value)
    if here == kind or pa.types.is_null(here):
        return kind
    if pa.types.is_null(kind):
        return here
    if {kind, here} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


def _type(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else pa.string()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return pa.list_(pa.string())
    return pa.string()


_WORDS = {"": None, "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _csv_value(value: str | None) -> Any:
    if value is None or value in _WORDS:
        return _WORDS[value or ""]
    for kind in () if "_" in value else (int, float):  # Python reads 1_000 as a number, nobody else does
        with suppress(ValueError):
            return kind(value)
    return value


# Values


def _said(value: Any) -> bytes | None:
    """A text's bytes as they were in the file, right or wrong; a number is its digits."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    try:
        return value.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, written \\ud800
        return value.encode(errors="surrogatepass")


def _texts(value: Any) -> list[bytes | None] | None:
    if isinstance(value, dict):
        return [_said(part) for part in listed(value) if isinstance(part, str)]
    return None if value is None else [_said(part) for part in listed(value)]


def _word(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None if value is None else value.encode(errors="replace").decode()
    return json.dumps(value)


def _words(value: Any) -> list[str | None] | None:
    return [_word(part) for part in value] if isinstance(value, list) else None


def _plain(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        value = _csv_value(value) if isinstance(value, str) else value
        return None if value is None else kind(value)

    return cast


_CASTS: dict[str, Callable[[Any], Any]] = {
    str(pa.binary()): _said,
    str(pa.list_(pa.binary())): _texts,
    str(pa.string()): _word,
    str(pa.list_(pa.string())): _words,
    str(pa.int64()): _plain(int),
    str(pa.float64()): _plain(float),
    str(pa.bool_()): _plain(bool),
    str(pa.null()): lambda value: None,
}

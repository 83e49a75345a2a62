"""CSV and JSON tables -> Parquet in the store, in a stream: 45 million rows take no more memory than a thousand.

A kept column has one type in the whole table, which a first pass over all rows finds. A row that cannot be read becomes
a row of nulls with the reason in its DAMAGE column, and is rejected and counted when it is read.
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

MOST_FIELDS = 1000  # distinct field names that are remembered of a table, to suggest one for a name that is missing


class Columns(NamedTuple):
    """The columns of a table that are read."""

    subject: list[str]  # images or ids, whose type is not checked here
    texts: list[str]  # each value is one text
    captions: list[str]  # texts, or lists of them
    kept: list[str]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.subject, *self.texts, *self.captions, *self.kept]))


def converted(
    store: Store, source: str, folder: Folder, name: str, columns: Columns, header: Sequence[str] = ()
) -> tuple[DataObject, int] | None:
    """A table's columns as Parquet in the store, and the number of its rows; None for a table without rows."""
    schema = _schema(lines(folder, name, header), name, columns)
    if schema is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "rows.parquet")
        with RowWriter(path, schema.append(pa.field(DAMAGE, pa.string()))) as writer:
            casts = [(column.name, _CASTS[str(column.type)]) for column in schema]
            for line in lines(folder, name, header):
                if isinstance(line, Rejection):
                    writer.add([*([None] * len(casts)), line.detail])
                else:
                    writer.add([*(cast(field(line, column)) for column, cast in casts), None])
        return put_data(store, layout.TABLES.at(), f"{source}.parquet", path), writer.rows


# Types


def _schema(rows: Iterator[Line], name: str, columns: Columns) -> pa.Schema | None:
    """The schema of the converted table, without DAMAGE; None for a table without rows.

    The type of a kept column is found from all its values; without kept columns, rows are read only until each column
    was seen. A column without values has the type null, which fits whatever type it has in other tables.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns.kept, pa.null())
    fields: dict[str, None] = {}
    missing = dict.fromkeys(columns.names)
    csv_text = kind_of(name) in (".csv", ".tsv")
    is_empty = True
    for line in rows:
        is_empty = False
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
    if is_empty:
        return None
    if not fields:
        raise DataError(f"{name} is not a readable table (no row in it can be read)", remedy="write it again")
    for column in missing:
        raise missing_column(name, column, list(fields))
    read_as = dict.fromkeys(columns.captions, pa.list_(pa.binary()))
    read_as |= dict.fromkeys([*columns.subject, *columns.texts], pa.binary()) | types
    return pa.schema([(column, read_as[column]) for column in columns.names])


def _wider(kind: pa.DataType, value: Any, *, csv_text: bool) -> pa.DataType:
    """The narrowest type that holds values of type `kind` and this one too; a text can hold every value."""
    if kind == pa.string():
        return kind
    own = _type(_csv_value(value) if csv_text else value)
    if own == kind or pa.types.is_null(own):
        return kind
    if pa.types.is_null(kind):
        return own
    return pa.float64() if {kind, own} == {pa.int64(), pa.float64()} else pa.string()


def _type(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else pa.string()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, list) and all(isinstance(element, str) for element in value):
        return pa.list_(pa.string())
    return pa.string()


_CONSTANTS = {"": None, "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def _csv_value(value: str | None) -> Any:
    """A field of a CSV as the number, truth value or null that it spells, or else as the text itself."""
    if value is None or value in _CONSTANTS:
        return _CONSTANTS[value or ""]
    for kind in () if "_" in value else (int, float):  # Python reads 1_000 as a number, nobody else does
        with suppress(ValueError):
            return kind(value)
    return value


# Values


def _as_bytes(value: Any) -> bytes | None:
    """A text's bytes as they were in the file, whether or not they are UTF-8; a number's digits; None for the rest."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    try:
        return value.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # JSON has escaped half of a surrogate pair: \\ud800
        return value.encode(errors="surrogatepass")


def _as_list_of_bytes(value: Any) -> list[bytes | None] | None:
    if value is None:
        return None
    texts_only = isinstance(value, dict)
    return [_as_bytes(text) for text in listed(value) if isinstance(text, str) or not texts_only]


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return None if value is None else json.dumps(value)


def _as_list_of_texts(value: Any) -> list[str | None] | None:
    return [_as_text(element) for element in value] if isinstance(value, list) else None


def _scalar(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        value = _csv_value(value) if isinstance(value, str) else value
        return None if value is None else kind(value)

    return cast


_CASTS: dict[str, Callable[[Any], Any]] = {
    str(pa.binary()): _as_bytes,
    str(pa.list_(pa.binary())): _as_list_of_bytes,
    str(pa.string()): _as_text,
    str(pa.list_(pa.string())): _as_list_of_texts,
    str(pa.int64()): _scalar(int),
    str(pa.float64()): _scalar(float),
    str(pa.bool_()): _scalar(bool),
    str(pa.null()): lambda value: None,
}

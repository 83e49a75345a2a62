"""JSONL and CSV tables -> Parquet in the store, line by line: a table of 45 million rows needs no more memory than one
of a thousand.

The lines are read by Python's own readers: pyarrow's JSON reader takes the process with it on deeply nested values,
and gives up a whole table for one damaged line. Here such a line becomes a row of nothing, which is refused and counted
like any other. A kept column has one type in the whole table, found in a first pass over all of it.

A record of a CSV may span lines, where a quoted field does. One that gets longer than a line may be, that never ends,
or that is not as CSV is written, is none: its lines are read one by one, so that a quote which nobody closes takes no
row with it. The line at which it goes wrong begins anew.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from data_prep.folders import Folder
from data_prep.sources.parquet import RowWriter
from data_prep.sources.raw import TABLES, missing_column
from infra.errors import DataError, SettingsError
from infra.records import DataObject, put_data
from infra.store import Store

SUFFIXES = (".parquet", ".jsonl", ".csv")
LONGEST_LINE = 4 << 20  # characters, also of a record of several lines; of a longer line nothing is kept
MOST_FIELDS = 1000  # names that a table's lines may have, all in all

Line = dict[str, Any] | None  # None: damaged


class Columns(NamedTuple):
    """What is wanted of a table."""

    subject: list[str]  # images or ids, whose type is not checked here
    texts: list[str]
    captions: list[str]  # texts, or lists of them
    kept: list[str]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.subject, *self.texts, *self.captions, *self.kept]))


def lines(folder: Folder, name: str) -> Iterator[Line]:
    if not name.endswith(SUFFIXES):
        raise SettingsError(f"{name} is no table", remedy=f"name a file that ends in {', '.join(SUFFIXES)}")
    with folder.open(name) as file:
        yield from _csv_lines(file, name) if name.endswith(".csv") else _json_lines(file)


def converted(store: Store, source: str, folder: Folder, name: str, columns: Columns) -> tuple[DataObject, int] | None:
    """The wanted columns of a table as a Parquet in the store, and its rows; None where it has none."""
    schema = _schema(lines(folder, name), name, columns)
    if schema is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "rows.parquet")
        with RowWriter(path, schema) as writer:
            casts = [(field.name, _CASTS[str(field.type)]) for field in schema]
            nothing = [None] * len(casts)
            for line in lines(folder, name):
                writer.add(nothing if line is None else [cast(line.get(column)) for column, cast in casts])
        return put_data(store, TABLES, f"{source}.parquet", path), writer.rows


# Lines


def _json_lines(file: BinaryIO) -> Iterator[Line]:
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            _skip_line(file)
            yield None
        elif line.strip():
            yield _json_line(line)


def _json_line(line: bytes) -> Line:
    try:
        found = json.loads(line.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _skip_line(file: BinaryIO) -> None:
    while (line := file.readline(LONGEST_LINE)) and not line.endswith(b"\n"):
        pass


def _csv_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    csv.field_size_limit(LONGEST_LINE)
    found = _TextLines(file)
    header = next((row for row in _records(found) if row != []), [])
    if header is None:
        raise DataError(f"{name} is not a readable table (no header)", remedy="its first line names the columns")
    if len(set(header)) < len(header):
        raise DataError(f"{name} is not a readable table (two columns have one name)", remedy="rename one")
    for row in _records(found, len(header)):
        if row == [] and len(header) == 1:
            yield {header[0]: ""}
        elif row != []:
            yield dict(zip(header, row, strict=True)) if row and len(row) == len(header) else None


def _records(found: _TextLines, fields: int | None = None) -> Iterator[list[str] | None]:
    """[] for an empty line, None for what is damaged; `fields` are those of a record, once that is known."""
    for line in found:
        row, is_open = _csv_row(line)
        if line is not None and is_open:
            yield from _spanning(found, line, fields)
        else:
            yield row


def _spanning(found: _TextLines, first: str, fields: int | None) -> Iterator[list[str] | None]:
    """What begins with a line that ends within quotes: a record of several lines, or these one by one."""
    held, cut_off = [first], False

    def following() -> Iterator[str]:
        nonlocal cut_off
        yield first
        size = len(first)
        for line in found:
            size += len(line or "")
            if line is None or size > LONGEST_LINE:
                found.give_back(line)
                break
            held.append(line)
            yield line
        cut_off = True

    with suppress(csv.Error):
        row = next(csv.reader(following(), strict=True))
        if fields is None or len(row) == fields:
            yield row
            return
    if len(held) > 1 and not cut_off:
        found.give_back(held.pop())
    for line in held:
        row_alone, is_open = _csv_row(line)
        yield None if is_open else row_alone


def _csv_row(line: str | None) -> tuple[list[str] | None, bool]:
    """A line's fields, and whether it ends within quotes."""
    if line is None:
        return None, False
    is_open = False

    def alone(line: str) -> Iterator[str]:
        nonlocal is_open
        yield line
        is_open = True  # the reader has asked for another line

    try:
        return next(csv.reader(alone(line) if '"' in line else [line])), is_open
    except csv.Error:
        return None, False


class _TextLines:
    """The lines with their ends, whichever those are; None for each that is too long. One can be given back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        self._last = ""
        self._back: list[str | None] = []

    def __iter__(self) -> Iterator[str | None]:
        return self

    def __next__(self) -> str | None:
        if self._back:
            return self._back.pop()
        cut_end = self._last.endswith("\r")
        line = self._read()
        if line == "\n" and cut_end:  # the limit has come between the halves of a line's end
            line = self._read()
        if not line:
            raise StopIteration
        if len(line) < LONGEST_LINE or line.endswith(("\n", "\r")):
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._read()
        return None

    def give_back(self, line: str | None) -> None:
        self._back.append(line)

    def _read(self) -> str:
        self._last = self._file.readline(LONGEST_LINE)
        return self._last


# Types


def _schema(found: Iterator[Line], name: str, columns: Columns) -> pa.Schema | None:
    """One type for a kept column, from all its values. Without kept columns the first lines tell what there is.

    None for a table without lines. A column without values has the type null, which goes with any other table's.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns.kept, pa.null())
    fields: dict[str, None] = {}
    rows = 0
    for line in found:
        rows += 1
        if line is None:
            continue
        if len(fields) < MOST_FIELDS:
            fields.update(dict.fromkeys(line))
        for column in columns.kept:
            types[column] = _wider(types[column], line.get(column), csv_text=name.endswith(".csv"))
        if not columns.kept and fields.keys() >= set(columns.names):
            break
    if not rows:
        return None
    if not fields:
        raise DataError(f"{name} is not a readable table (no row in it can be read)", remedy="write it again")
    for column in columns.names:
        if column not in fields:
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
    return None if value is None else [_said(part) for part in (value if isinstance(value, list) else [value])]


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

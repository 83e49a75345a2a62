"""Tables of text, row by row: JSON lines, arrays of JSON, CSV and TSV, packed or plain.

The rows are read by Python's own readers: pyarrow's JSON reader takes the process with it on deeply nested values,
and gives up a whole table for one damaged line. Here such a line is a rejection in its place, so that it is counted.

A record of a CSV may span lines, where a quoted field does. One that gets longer than a line may be, that never ends,
or that is not as CSV is written, is none: its lines are read one by one, so that a quote which nobody closes takes no
row with it. The line at which it goes wrong begins anew.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from data_prep.rejections import Cause, Rejection
from data_prep.sources.base import foreign
from data_prep.sources.folders import BUFFER, Folder
from data_prep.sources.json_array import Elements
from data_prep.sources.packed import PACKINGS, Unpacked, packing_of
from infra.errors import DataError, SettingsError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", *(kind + packing for packing in ("", *PACKINGS) for kind in KINDS))
LONGEST_LINE = 4 << 20  # characters, also of a record of several lines; of a longer line nothing is kept

Line = dict[str, Any] | Rejection


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def lines(folder: Folder, name: str, header: Sequence[str] = ()) -> Iterator[Line]:
    """The rows. Where a packed table breaks off, the row that it breaks off in and all that follow are one."""
    kind = kind_of(name)
    if kind not in KINDS:
        raise SettingsError(f"{name} is no table", remedy=foreign(name) or "name a file that ends in " + _ENDS)
    with folder.open(name) as opened:
        if not packing_of(name):
            yield from _lines(opened, name, kind, header)
            return
        file = Unpacked(opened, packing_of(name), name)
        last: Line | None = None
        for line in _lines(io.BufferedReader(file, BUFFER), name, kind, header):
            if last is not None:
                yield last
            last = line
        if last is not None and (not file.broken or (isinstance(last, dict) and file.last == b"\n")):
            yield last
        if file.broken:
            yield _damaged(file.broken)


def is_array(folder: Folder, name: str) -> bool:
    """Whether a .json may be a table: most are not, but say something of a picture or a folder."""
    with folder.open(name, 1 << 16) as opened:
        file = Unpacked(opened, packing_of(name), name) if packing_of(name) else opened
        return file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def ending_of(name: str) -> str:
    """The suffixes of a table, as they are written."""
    length = len(kind_of(name) + packing_of(name))
    return name[len(name) - length :]


def kind_of(name: str) -> str:
    """The suffix that says how a table is written, whether it is packed or not; empty for what is no table."""
    plain = name.lower().removesuffix(packing_of(name))
    return next((kind for kind in (*KINDS, ".parquet") if plain.endswith(kind)), "")


_ENDS = f"{', '.join(('.parquet', *KINDS))}, packed ({', '.join(PACKINGS)}) or plain"


def _lines(file: BinaryIO, name: str, kind: str, header: Sequence[str]) -> Iterator[Line]:
    if kind in (".csv", ".tsv"):
        return _csv_lines(file, name, "\t" if kind == ".tsv" else ",", header)
    if kind == ".json":
        return _json_rows(file, name)
    return _json_lines(file)


def _damaged(detail: str) -> Rejection:
    return Rejection(Cause.BAD_ROW, detail)


_TOO_LONG = f"longer than {LONGEST_LINE:,} characters"


# JSON


def _json_lines(file: BinaryIO, first: bytes = b"") -> Iterator[Line]:
    while line := first + file.readline(LONGEST_LINE):
        if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
            _skip_line(file)
            yield _damaged(_TOO_LONG)
        elif line.strip():
            yield _json_row(line)
        first = b""


def _json_row(text: bytes) -> Line:
    try:
        found = json.loads(text.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return _damaged("not JSON, or too deep")
    return found if isinstance(found, dict) else _damaged("JSON, but no object")


def _skip_line(file: BinaryIO) -> None:
    while (line := file.readline(LONGEST_LINE)) and not line.endswith(b"\n"):
        pass


def _json_rows(file: BinaryIO, name: str) -> Iterator[Line]:
    """An array of objects, or lines of them, which some call .json too."""
    start = b""
    while not start.strip(b"\xef\xbb\xbf \t\r\n") and (byte := file.read(1)):
        start += byte if byte.strip() else b""
    if start.endswith(b"["):
        elements = Elements(file, LONGEST_LINE)
        for element in elements:
            yield _damaged(_TOO_LONG) if element is None else _json_row(element)
        if elements.broken:
            yield _damaged(elements.broken)
        return
    rows = _json_lines(file, start)
    first = next(rows, None)
    if isinstance(first, Rejection):
        raise DataError(
            f"{name} is not a readable table (neither an array of rows nor a row a line)",
            remedy='write its rows alone: [{"file_name": "a.jpg", "text": "..."}, ...]',
        )
    if first is not None:
        yield first
        yield from rows


# CSV


def _csv_lines(file: BinaryIO, name: str, comma: str = ",", header: Sequence[str] = ()) -> Iterator[Line]:
    csv.field_size_limit(LONGEST_LINE)
    found = _Records(file, comma)
    names = header or next((row for row in found.rows() if row != []), [])
    if isinstance(names, Rejection):
        raise DataError(f"{name} is not a readable table (no header)", remedy="its first line names the columns")
    if len(set(names)) < len(names):
        raise DataError(f"{name} is not a readable table (two columns have one name)", remedy="rename one")
    for row in found.rows(len(names)):
        if isinstance(row, Rejection):
            yield row
        elif row == [] and len(names) == 1:
            yield {names[0]: ""}
        elif row and len(row) != len(names):
            yield _damaged(f"{len(row)} fields, where the table has {len(names)}")
        elif row:
            yield dict(zip(names, row, strict=True))


_NOT_CSV = "not as CSV is written, or with a quote that nobody closes"


class _Records:
    """Rows of fields; [] for an empty line."""

    def __init__(self, file: BinaryIO, comma: str) -> None:
        self._lines, self._comma = _TextLines(file), comma

    def rows(self, fields: int | None = None) -> Iterator[list[str] | Rejection]:
        """`fields` are those of a record, once that is known."""
        for line in self._lines:
            row, is_open = self._row(line)
            if line is not None and is_open:
                yield from self._spanning(line, fields)
            else:
                yield row

    def _spanning(self, first: str, fields: int | None) -> Iterator[list[str] | Rejection]:
        """What begins with a line that ends within quotes: a record of several lines, or these one by one."""
        held, cut_off = [first], False

        def following() -> Iterator[str]:
            nonlocal cut_off
            yield first
            size = len(first)
            for line in self._lines:
                size += len(line or "")
                if line is None or size > LONGEST_LINE:
                    self._lines.give_back(line)
                    break
                held.append(line)
                yield line
            cut_off = True

        with suppress(csv.Error):
            row = next(csv.reader(following(), strict=True, delimiter=self._comma))
            if fields is None or len(row) == fields:
                yield row
                return
        if len(held) > 1 and not cut_off:
            self._lines.give_back(held.pop())
        for line in held:
            row_alone, is_open = self._row(line)
            yield _damaged(_NOT_CSV) if is_open else row_alone

    def _row(self, line: str | None) -> tuple[list[str] | Rejection, bool]:
        """A line's fields, and whether it ends within quotes."""
        if line is None:
            return _damaged(_TOO_LONG), False
        is_open = False

        def alone(line: str) -> Iterator[str]:
            nonlocal is_open
            yield line
            is_open = True  # the reader has asked for another line

        try:
            return next(csv.reader(alone(line) if '"' in line else [line], delimiter=self._comma)), is_open
        except csv.Error:
            return _damaged(_NOT_CSV), False


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

"""CSV, TSV, JSON lines and JSON arrays, compressed or plain, read row by row.

Python's own parsers are used: pyarrow's JSON reader crashes the process on deeply nested values, and both of its
readers give up a whole table for one damaged line. Here a damaged line is a rejection in its place, so it is counted.

A CSV record may span lines, since a quoted field may. A quote that is never closed would take all rows behind it into
its field. So lines are joined into a record only if strict CSV with the right number of fields comes of it before
LONGEST_LINE; if not, they are read as a record each, and the line at which it went wrong may begin another one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, BinaryIO

from data_prep.rejections import Cause, Rejection
from data_prep.sources.base import foreign
from data_prep.sources.folders import BUFFER, Folder
from data_prep.sources.json_array import Elements
from data_prep.sources.packed import PACKINGS, Unpacked, packing_of
from infra.errors import DataError, SettingsError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", *(kind + packing for packing in ("", *PACKINGS) for kind in KINDS))
LONGEST_LINE = 4 << 20  # characters of a line, or of a record of several lines; a longer line is rejected

Line = dict[str, Any] | Rejection


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def lines(folder: Folder, name: str, header: Sequence[str] = ()) -> Iterator[Line]:
    """The rows. If a compressed table breaks off, the row in which it does and all behind it are one rejection."""
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
    """Whether a .json file holds an array, so that it may be a table; most hold metadata of an image or a folder."""
    with folder.open(name, 1 << 16) as opened:
        file = Unpacked(opened, packing_of(name), name) if packing_of(name) else opened
        return file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def ending_of(name: str) -> str:
    """The suffixes of a table in the case they are written in: `.csv.GZ`."""
    length = len(kind_of(name) + packing_of(name))
    return name[len(name) - length :]


def kind_of(name: str) -> str:
    """A table's suffix without that of its compression: `.csv` for t.csv.gz; empty for what is not a table."""
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
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield _damaged(_TOO_LONG)
        elif line.strip():
            yield _json_row(line)
        first = b""


def _json_row(text: bytes) -> Line:
    try:
        row = json.loads(text.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return _damaged("not JSON, or too deep")
    return row if isinstance(row, dict) else _damaged("JSON, but no object")


def _json_rows(file: BinaryIO, name: str) -> Iterator[Line]:
    """The rows of a .json file: an array of objects or, as some write it, an object in each line."""
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
    text = _text_lines(file)
    names = header or next((row for row in _csv_records(text, comma) if row != []), [])
    if isinstance(names, Rejection):
        raise DataError(f"{name} is not a readable table (no header)", remedy="its first line names the columns")
    if len(set(names)) < len(names):
        raise DataError(f"{name} is not a readable table (two columns have one name)", remedy="rename one")
    for row in _csv_records(text, comma, len(names)):
        if isinstance(row, Rejection):
            yield row
        elif row == [] and len(names) == 1:
            yield {names[0]: ""}
        elif row and len(row) != len(names):
            yield _damaged(f"{len(row)} fields, where the table has {len(names)}")
        elif row:
            yield dict(zip(names, row, strict=True))


_NOT_CSV = "not as CSV is written, or with a quote that nobody closes"


def _csv_records(text: Iterator[str | None], comma: str, fields: int | None = None) -> Iterator[list[str] | Rejection]:
    """The fields of each record, [] for an empty line. A record of several lines must have `fields`, if given."""
    again: str | None = ""  # the line at which the last record went wrong
    while (first := again or next(text, "")) != "":
        held, again, row = [first], "", None
        with suppress(csv.Error):
            row = next(csv.reader(_following(held, text), strict=True, delimiter=comma), None)
        if row is not None and (len(held) == 1 or fields is None or len(row) == fields):
            yield row
            continue
        if len(held) > 1 and held[-1] is not None:
            again = held.pop()
        yield from (_lone_record(line, comma) for line in held)


def _following(held: list[str | None], text: Iterator[str | None]) -> Iterator[str]:
    """The held line, and as many of those behind it as the parser asks for, which are then held too."""
    size = 0
    for line in chain(held[:1], text):
        if size:
            held.append(line)
        size += len(line or "")
        if line is None or size > LONGEST_LINE:
            return
        yield line


def _lone_record(line: str | None, comma: str) -> list[str] | Rejection:
    """The fields of a line by itself. Quotes within a field are accepted, but a quoted field must end."""
    if line is None:
        return _damaged(_TOO_LONG)
    reader = csv.reader([line, ""], delimiter=comma)
    with suppress(csv.Error):
        row = next(reader)
        if reader.line_num == 1:  # it did not ask for another line to close a quote
            return row
    return _damaged(_NOT_CSV)


def _text_lines(file: BinaryIO) -> Iterator[str | None]:
    """Each line with its end, be it \\n, \\r or both; None for each that is longer than LONGEST_LINE."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    last, too_long = "", False
    while part := text.readline(LONGEST_LINE):
        is_rest_of_end, last = part == "\n" and last.endswith("\r"), part  # the limit fell between \\r and \\n
        if is_rest_of_end:
            continue
        is_end = len(part) < LONGEST_LINE or part.endswith(("\n", "\r"))
        if is_end:
            yield None if too_long else part
        too_long = not is_end
    if too_long:
        yield None

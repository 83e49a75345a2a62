"""Parquet tables read and written in a stream: a few rows at a time, whatever the size of the table.

A damaged page in a corpus's table costs the rest of its row group: these rows are counted as rejected, and all others
are read. A table in the store has its hash in its name; damage to it is damage to the store, and so an error.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.rejections import Cause, Rejection
from data_prep.sources.base import DAMAGE, ROW, Range, Rows, Source
from data_prep.sources.fields import field, has_odd_lists, is_list, kind_of, top
from data_prep.sources.folders import StoreFolder, open_folder
from infra.errors import DataError
from infra.store import Store

BATCH = 64  # rows: a caption may be megabytes
BUFFER = 1 << 20  # bytes of a column that are read at once
GROUP_ROWS, GROUP_BYTES = 1 << 16, 64 << 20  # at which a row group is written

Row = dict[str, Any] | Rejection


class Lost(NamedTuple):
    """Rows that cannot be read."""

    rows: int
    group: int

    @property
    def why(self) -> Rejection:
        return Rejection(Cause.BAD_ROW, f"a damaged page in row group {self.group}")


def open_rows(source: Source, store: Store, part: Range) -> BinaryIO:
    return StoreFolder(store).open(part.table) if part.in_store else open_folder(source.url).open(part.table)


@contextmanager
def opened(file: BinaryIO, name: str) -> Iterator[pq.ParquetFile]:
    with file, readable(name):
        table = pq.ParquetFile(file, buffer_size=BUFFER)
        yield _without_arrow_types(file) if any(has_odd_lists(column.type) for column in table.schema_arrow) else table


def _without_arrow_types(file: BinaryIO) -> pq.ParquetFile:
    """A table opened with Parquet's own types alone: the footer's entry with Arrow's types is renamed, so not found.

    Arrow fails to read a fixed-size list column that has nulls, and reads list views wrongly.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(end - 8)
    tail = file.read(8)
    start = end - 8 - int.from_bytes(tail[:4], "little")
    file.seek(start)
    footer = file.read(end - 8 - start).replace(b"ARROW:schema", b"arrow_schema")
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer + tail))
    return pq.ParquetFile(file, metadata=metadata, buffer_size=BUFFER)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Tell Arrow's errors in this block as a DataError about the table."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        _check_disk(error, name)
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name} is not a readable Parquet file ({reason})", remedy="write it again, or leave it out"
        ) from None


def _check_disk(error: BaseException, name: str) -> None:
    """Raise a DataError if the disk failed, which says nothing of the table: Arrow's own errors have no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise DataError(
            f"{name} cannot be read ({error.strerror})", remedy="check the disk that it lies on, and run again"
        ) from None


def rows(
    source: Source, store: Store, part: Rows, columns: Sequence[str], batch: int = BATCH
) -> Iterator[tuple[int, Row]]:
    """The rows of a range with their numbers in the input; texts are bytes, since they may not be UTF-8."""
    with opened(open_rows(source, store, part), part.table) as file:
        ours = [name for name in (ROW, DAMAGE) if part.in_store and name in file.schema_arrow.names]
        number = part.first
        for rows in batches(file, part.table, [*columns, *ours], batch, part.first, part.rows, whole=part.in_store):
            if isinstance(rows, Lost):
                yield from ((number + offset, rows.why) for offset in range(rows.rows))
                number += rows.rows
                continue
            for row in unchecked(rows).to_pylist():
                row_in_input = row.pop(ROW) if ROW in ours else number
                damage = row.pop(DAMAGE) if DAMAGE in ours else None
                yield row_in_input, row if damage is None else Rejection(Cause.BAD_ROW, damage.decode())
                number += 1
    if number != part.first + part.rows:
        raise DataError(f"{part.table} has become shorter since it was planned", remedy="run prepare again")


def batches(
    file: pq.ParquetFile,
    name: str,
    columns: Sequence[str],
    batch: int,
    first: int = 0,
    rows: int | None = None,
    *,
    whole: bool = False,
) -> Iterator[pa.Table | Lost]:
    """Rows [first, first + rows) of the columns that these paths lead into; with `whole`, damage is an error."""
    wanted = list(dict.fromkeys(_stored(file.schema_arrow, column) for column in columns))
    begin, end = first, file.metadata.num_rows if rows is None else first + rows
    at = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(begin, at) - at, min(end, at + count) - at
        if low < high:
            yield from _Group(file, name, wanted, group, whole).rows(low, high, batch)
        at += count


def filled(file: pq.ParquetFile, name: str, batch: int, *, whole: bool = False) -> Iterator[pa.Table]:
    """All rows and columns, with a DAMAGE column as `convert` writes it; rows that cannot be read are nulls."""
    schema = file.schema_arrow
    for rows in batches(file, name, schema.names, batch, whole=whole):
        if isinstance(rows, Lost):
            nulls = [pa.nulls(rows.rows, column.type) for column in schema]
            why = pa.array([rows.why.detail] * rows.rows, pa.string())
            yield pa.table([*nulls, why], schema=schema.append(pa.field(DAMAGE, pa.string())))
        elif DAMAGE in schema.names:
            yield rows
        else:
            yield rows.append_column(DAMAGE, pa.nulls(rows.num_rows, pa.string()))


def _stored(schema: pa.Schema, path: str) -> str:
    """The longest leading part of a path that can be read by itself: fields of structs, but not of lists.

    Parquet's name for the elements of a list differs with the writer, so a list is read as a whole.
    """
    start = stored = top(schema.names, path)
    if not start:
        return path
    kind = schema.field(start).type
    for name in filter(None, path[len(start) :].split(".")):
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return start
        kind, stored = kind.field(name).type, f"{stored}.{name}"
    return stored


class _Group(NamedTuple):
    file: pq.ParquetFile
    name: str
    columns: list[str]
    number: int
    whole: bool

    def rows(self, low: int, high: int, batch: int) -> Iterator[pa.Table | Lost]:
        """Rows low to high of the group. Reading begins at its start, and ends at the first damage.

        The first row that is lost does not depend on `low`, `high` and `batch`, so all readers lose the same rows.
        """
        at = 0
        tables = self.file.iter_batches(batch, [self.number], self.columns, use_threads=False)
        while at < high:
            try:
                table = pa.Table.from_batches([next(tables)])
            except StopIteration:  # its page holds fewer rows than the table says
                yield Lost(high - max(at, low), self.number)
                return
            except (pa.ArrowException, OSError) as error:
                if self.whole or isinstance(error, MemoryError):
                    raise
                _check_disk(error, self.name)
                yield from self._around(max(at, low), high, batch, at + batch)
                return
            wanted = table.slice(max(0, low - at), max(0, min(high, at + table.num_rows) - max(low, at)))
            at += table.num_rows
            if wanted.num_rows:
                yield wanted

    def _around(self, low: int, high: int, batch: int, damaged: int) -> Iterator[pa.Table | Lost]:
        """Rows low to high, of which a batch that ends at `damaged` could not be read: smaller batches may be."""
        end = max(low, min(high, damaged)) if batch > 1 else low
        lost = high - end
        for rows in self.rows(low, end, max(1, batch // 8)) if low < end else ():
            if isinstance(rows, Lost):
                lost += rows.rows
            else:
                yield rows
        if lost:
            yield Lost(lost, self.number)


def kept_fields(source: Source, store: Store, part: Range, names: Sequence[str]) -> list[pa.Field]:
    """These columns as fields of the index, with the types that a range's table gives them."""
    with opened(open_rows(source, store, part), part.table) as file:
        schema = file.schema_arrow
    return [pa.field(name, plain_type(kind_of(schema, name))) for name in names]


def unchecked(table: pa.Table) -> pa.Table:
    """Texts as bytes, however deeply nested: what a table declares as UTF-8 need not be."""
    return table.cast(pa.schema([pa.field(column.name, _as_bytes(column.type)) for column in table.schema]))


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if _is_string(kind):
        return pa.binary()
    if is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(inner.name, _as_bytes(inner.type)) for inner in kind])
    return kind


def values(table: pa.Table, path: str) -> list[Any]:
    """The value that a path leads to in each row."""
    start = top(table.column_names, path)
    column = unchecked(table.select([start])).column(0).to_pylist()
    return column if start == path else [field({start: value}, path) for value in column]


class RowWriter:
    """Writes rows to a Parquet file; it holds at most one row group in memory, as columns."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._rows: list[Sequence[Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0  # of the batches

    def add(self, row: Sequence[Any]) -> None:
        self.rows += 1
        self._rows.append(row)
        if len(self._rows) == 2 * BATCH:
            self._to_columns()
            if len(self._batches) * 2 * BATCH >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
                self._flush()

    def _to_columns(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=self._schema))
        self._bytes += self._batches[-1].nbytes
        self._rows = []

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, schema=self._schema))
        self._batches, self._bytes = [], 0

    def close(self) -> None:
        if self._rows:
            self._to_columns()
        if self._batches:
            self._flush()
        self._writer.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def plain_type(kind: pa.DataType) -> pa.DataType | None:
    """The type with which the index stores a column of this type; None if it does not store such columns."""
    types = pa.types
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if _is_string(kind):
        return pa.string()
    if is_list(kind):
        inner = plain_type(kind.value_type)
        return None if inner is None else pa.list_(inner)
    # A column without values has the type null, which fits whatever type it has in other tables.
    known = types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return kind if known else None


def _is_string(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_null(kind) or is_bytes(kind) or pa.types.is_string(plain_type(kind) or pa.null()))


def is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

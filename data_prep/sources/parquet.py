"""Parquet tables read and written in a stream: a few rows at a time, whatever the size of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.folders import StoreFolder, open_folder
from data_prep.sources.raw import ROW, Corpus, Range
from infra.errors import DataError
from infra.store import Store

BATCH = 64  # rows: a caption may be megabytes
BUFFER = 1 << 20  # bytes of a column that are read at once
GROUP_ROWS, GROUP_BYTES = 1 << 16, 64 << 20  # of a row group that is written


def open_rows(source: Corpus, store: Store, part: Range) -> BinaryIO:
    return StoreFolder(store).open(part.table) if part.in_store else open_folder(source.url).open(part.table)


@contextmanager
def opened(file: BinaryIO, name: str) -> Iterator[pq.ParquetFile]:
    with file, readable(name):
        yield pq.ParquetFile(file, buffer_size=BUFFER)


@contextmanager
def readable(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name} is not a readable Parquet file ({reason})", remedy="write it again, or leave it out"
        ) from None


def rows(
    source: Corpus, store: Store, part: Range, columns: Sequence[str], batch: int = BATCH
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The planned rows with their numbers in the input; texts as bytes, since nobody has checked them."""
    with opened(open_rows(source, store, part), part.table) as file:
        chosen = part.in_store and ROW in file.schema_arrow.names
        wanted = list(dict.fromkeys([*columns, *([ROW] if chosen else [])]))
        number = part.first
        for table in _tables(file, part, wanted, batch):
            for row in table.to_pylist():
                yield (row.pop(ROW) if chosen else number), row
                number += 1
    if number != part.first + part.rows:
        raise DataError(f"{part.table} has become shorter since it was planned", remedy="run prepare again")


def _tables(file: pq.ParquetFile, part: Range, columns: list[str], batch: int) -> Iterator[pa.Table]:
    """Rows first to first + rows, from the row groups that hold them."""
    groups, skip, seen = [], part.first, 0
    for number in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        if seen + count <= part.first:
            skip -= count
        elif seen < part.first + part.rows:
            groups.append(number)
        seen += count
    left = part.rows
    for found in file.iter_batches(batch, groups, columns, use_threads=False) if groups else ():
        table = pa.Table.from_batches([found]).slice(skip, left)
        skip -= min(skip, found.num_rows)
        left -= table.num_rows
        if table.num_rows:
            yield unchecked(table.select(columns))
        if not left:
            return


def kept_fields(source: Corpus, store: Store, part: Range, names: Sequence[str]) -> list[pa.Field]:
    with opened(open_rows(source, store, part), part.table) as file:
        schema = file.schema_arrow
    return [pa.field(name, plain_type(schema.field(name).type)) for name in names]


def unchecked(table: pa.Table) -> pa.Table:
    """Texts as bytes: a table may call them UTF-8 without their being so."""
    return table.cast(pa.schema([_unchecked(field) for field in table.schema]))


def _unchecked(field: pa.Field) -> pa.Field:
    plain = plain_type(field.type)
    return field if plain is None else pa.field(field.name, _as_bytes(plain))


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    return pa.list_(_as_bytes(kind.value_type)) if is_list(kind) else kind


class RowWriter:
    """Rows into a file, no more than one row group of which is in memory, as columns."""

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
    """The index's type for a column of this type; None for those that it does not take."""
    types = pa.types
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if is_list(kind):
        inner = plain_type(kind.value_type)
        return None if inner is None else pa.list_(inner)
    # A column without a single value: null goes with whatever type other tables have for it.
    known = types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return kind if known else None


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_null(kind) or is_bytes(kind) or pa.types.is_string(plain_type(kind) or pa.null()))


def is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

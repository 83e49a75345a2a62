"""The columns that a filter may name: those of all shards together, with one type for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.reading import in_order
from infra.errors import DataError
from infra.records import ShardRecord
from infra.shards import read_index
from infra.store import Store

FOOTER = 1 << 16  # bytes at the end of an index, in which its Parquet footer usually fits


def columns_of(
    store: Store, shards: Sequence[ShardRecord], readers: int, asked: set[str]
) -> tuple[list[list[str]], pa.Schema]:
    """The names of each index's columns, and one schema for all; `asked` are the columns that the filter names."""
    names, schemas = [], {}
    for schema in in_order(partial(index_schema, store), shards, readers):
        names.append(schema.names)
        schemas[schema.to_string()] = schema
    return names, _unified([schemas[text] for text in sorted(schemas)], asked)


def _unified(schemas: Sequence[pa.Schema], asked: set[str]) -> pa.Schema:
    """One type for each column, wide enough for all tables: a column may hold integers in one and floats in another.

    A column whose types cannot be unified (text and numbers) is left out; if the filter names it, that is an error.
    """
    fields: dict[str, pa.Field] = {}
    clashing: set[str] = set()
    for field in (field for schema in schemas for field in schema):
        before = fields.setdefault(field.name, field)
        try:
            both = [pa.schema([before]), pa.schema([field])]
            fields[field.name] = pa.unify_schemas(both, promote_options="permissive").field(0)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            if field.name in asked:
                raise DataError(
                    f"the column `{field.name}` is {before.type} in one table and {field.type} in another",
                    remedy="filter by another column, or prepare them as sources that keep it under two names",
                ) from None
            clashing.add(field.name)
    return pa.schema([field for name, field in fields.items() if name not in clashing])


def index_schema(store: Store, shard: ShardRecord) -> pa.Schema:
    """The columns of an index, read from its last bytes if these hold the whole footer."""
    start = max(0, shard.index.size - FOOTER)
    try:
        return pq.read_schema(pa.BufferReader(store.get(shard.index.key, start)))
    except pa.ArrowInvalid:
        return read_index(store, shard).schema


def with_columns(schema: pa.Schema, fields: Iterable[pa.Field], asked: set[str]) -> pa.Schema:
    """The schema with further columns; a name that occurs twice is an error if the filter asks for it."""
    for field in fields:
        if field.name not in schema.names:
            schema = schema.append(field)
        elif field.name in asked:
            raise DataError(
                f"two columns of these shards and their scores are called `{field.name}`",
                remedy="keep the corpus's under another name, or name one of the scores only",
            )
    return schema

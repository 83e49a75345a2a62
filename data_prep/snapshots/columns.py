"""The columns of all shards together: what a filter may ask for, with one type for each."""

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

FOOTER = 1 << 16  # bytes at the end of an index: they tell its columns


def columns_of(
    store: Store, shards: Sequence[ShardRecord], readers: int, asked: set[str]
) -> tuple[list[list[str]], pa.Schema]:
    """The columns of each index, and those of all together."""
    names, schemas = [], {}
    for schema in in_order(partial(index_schema, store), shards, readers):
        names.append(schema.names)
        schemas[schema.to_string()] = schema
    return names, _unified([schemas[text] for text in sorted(schemas)], asked)


def _unified(schemas: Sequence[pa.Schema], asked: set[str]) -> pa.Schema:
    """Numbers of several kinds are the widest of them: tables are typed one by one, whole numbers here, others there.

    What goes together in no way is a column of its own in each table, and none that a filter could ask for.
    """
    found: dict[str, pa.Field] = {}
    apart: set[str] = set()
    for field in (field for schema in schemas for field in schema):
        before = found.setdefault(field.name, field)
        try:
            both = [pa.schema([before]), pa.schema([field])]
            found[field.name] = pa.unify_schemas(both, promote_options="permissive").field(0)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            if field.name in asked:
                raise DataError(
                    f"the column `{field.name}` is {before.type} in one table and {field.type} in another",
                    remedy="filter by another column, or prepare them as sources that keep it under two names",
                ) from None
            apart.add(field.name)
    return pa.schema([field for name, field in found.items() if name not in apart])


def index_schema(store: Store, shard: ShardRecord) -> pa.Schema:
    """The columns of an index, from its end alone where that tells them."""
    start = max(0, shard.index.size - FOOTER)
    try:
        return pq.read_schema(pa.BufferReader(store.get(shard.index.key, start)))
    except pa.ArrowInvalid:
        return read_index(store, shard).schema


def with_columns(schema: pa.Schema, fields: Iterable[pa.Field], asked: set[str]) -> pa.Schema:
    for field in fields:
        if field.name not in schema.names:
            schema = schema.append(field)
        elif field.name in asked:
            raise DataError(
                f"two columns of these shards and their scores are called `{field.name}`",
                remedy="keep the corpus's under another name, or name one of the scores only",
            )
    return schema

"""Trying failed downloads again: those rows of a list whose cause may pass become a later generation of the list.

downloads/lists/<place>/1/again.json   RetryRecord: the rows that failed in generation 0
downloads/lists/<place>/1/links.json   LinksRecord of these rows (`links`), written by the next `prepare`
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.prepare import links, originals
from data_prep.prepare.links import At, LinksRecord
from data_prep.prepare.originals import State
from data_prep.rejections import TRANSIENT
from data_prep.sources import ROW, Range, UrlSource, parquet
from data_prep.sources.base import DAMAGE
from data_prep.sources.reading import in_order
from infra import layout
from infra.errors import DataError
from infra.records import DataObject, Record, put_data, read_record, write_record
from infra.shards import parquet_bytes, read_parquet
from infra.store import Store

BATCH = 1 << 14  # rows of a list that are read at once

FAILED = pa.schema([pa.field("row", pa.int64(), nullable=False), pa.field("cause", pa.string(), nullable=False)])


class RetryRecord(Record):
    """The rows that a generation tries again."""

    table: DataObject  # `row` in the input, and the `cause` for which it failed
    rows: int
    causes: dict[str, int]  # cause -> count


class Retry(NamedTuple):
    """A generation that could be begun."""

    at: At
    failed: pa.Table


def retries(store: Store, place: str) -> list[RetryRecord]:
    """The retries of a list, in their order: the generations after the first."""
    records: list[RetryRecord] = []
    while store.exists(key := layout.RETRY.at(list=place, generation=len(records) + 1)):
        records.append(read_record(store, key, RetryRecord))
    return records


def retry(store: Store, name: str, place: str, states: Mapping[str, State]) -> Retry | None:
    """What failed in the newest generation of the list `name`; None if none of it was tried. Nothing is written."""
    earlier = retries(store, place)
    newest = At(place, len(earlier))
    record = links.read_links(store, newest)
    if record is None:  # also where a generation has just been begun, for another stage or source with the same list
        return None
    failed = pa.concat_tables([FAILED.empty_table(), *_failed(store, name, states, record)])
    if earlier:
        rows = read_parquet(store, earlier[-1].table, ["row"])["row"]
        failed = pa.table([rows.take(failed["row"]), failed["cause"]], schema=FAILED)
    return Retry(At(place, newest.generation + 1), failed)


def begin(store: Store, retry: Retry) -> int:
    """Let the next `prepare` try again; returns how many rows it will try."""
    if not retry.failed.num_rows:
        return 0
    record = RetryRecord(
        table=put_data(store, layout.ORIGINALS.at(), "again.parquet", parquet_bytes(retry.failed)),
        rows=retry.failed.num_rows,
        causes=dict(sorted(Counter(retry.failed["cause"].to_pylist()).items())),
    )
    key = layout.RETRY.at(list=retry.at.place, generation=retry.at.generation)
    return record.rows if write_record(store, key, record) else 0


def _failed(store: Store, name: str, states: Mapping[str, State], record: LinksRecord) -> Iterator[pa.Table]:
    """The rows of a list that failed for causes that may pass."""
    by_batch: dict[str, pa.Array | None] = {}
    for first, part in links.slices(store, record):
        new = [batch for batch in part.names if batch not in by_batch]
        by_batch |= zip(new, in_order(partial(_causes, store, name, states), new), strict=True)
        causes = np.full(len(part.codes), None, object)
        for number, batch in enumerate(part.names):
            if (of_batch := by_batch[batch]) is not None:
                rows = np.flatnonzero(part.codes == number)
                causes[rows] = of_batch.take(pa.array(part.at[rows])).to_pylist()
        rows = np.flatnonzero(causes)
        yield pa.table([pa.array(first + rows), pa.array(causes[rows], pa.string())], schema=FAILED)


def _causes(store: Store, name: str, states: Mapping[str, State], batch: str) -> pa.Array | None:
    """The cause of each row of a batch, null if it cannot pass; None if no cause of the batch can."""
    state = states.get(batch, originals.NOTHING)
    if state.attempt < 0:
        raise DataError(f"the downloads of {name} are not finished", remedy="prepare without a retry first")
    record = originals.read_batch(store, batch, state.attempt)
    if not TRANSIENT & record.rejected.keys():
        return None
    causes = originals.read_index(store, record, ["cause"])["cause"].combine_chunks()
    return pc.if_else(pc.is_in(causes, pa.array([cause.value for cause in TRANSIENT])), causes, None)


def rows_again(store: Store, source: UrlSource, whole: Range, again: RetryRecord) -> str:
    """Store a table of the rows that are tried again, with the columns that the source asks for now; return its key."""
    rows = read_parquet(store, again.table, ["row"])["row"].to_numpy()
    with tempfile.TemporaryDirectory(prefix="pixnerd-again-") as folder, ExitStack() as files:
        file = files.enter_context(parquet.opened(parquet.open_rows(source, store, whole), whole.table))
        path, first = Path(folder, "again"), 0
        damage = [pa.field(DAMAGE, pa.string())] * (DAMAGE not in file.schema_arrow.names)
        schema = pa.schema([*file.schema_arrow, *damage, pa.field(ROW, pa.int64())])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in parquet.filled(file, whole.table, BATCH, whole=whole.in_store):
                begin, end = np.searchsorted(rows, [first, first + batch.num_rows])
                chosen = rows[begin:end]
                if len(chosen):
                    part = batch.take(pa.array(chosen - first)).append_column(ROW, pa.array(chosen))
                    writer.write_table(part.cast(schema))
                first += batch.num_rows
        return put_data(store, layout.TABLES.at(), f"{source.name}.parquet", path).key

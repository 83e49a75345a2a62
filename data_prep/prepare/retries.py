"""Trying again what failed for causes that can pass: a later generation of a list, of the rows of which that is true.

downloads/lists/<place>/1/again.json   RetryRecord: what failed in generation 0
downloads/lists/<place>/1/links.json   what came of it (see links.py), with the next `prepare`
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
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

BATCH = 1 << 14  # rows

FAILED = pa.schema([pa.field("row", pa.int64(), nullable=False), pa.field("cause", pa.string(), nullable=False)])


class RetryRecord(Record):
    """What a generation tries again."""

    table: DataObject  # `row` in the input, and `cause`
    rows: int
    causes: dict[str, int]  # why they had failed -> count


class Retry(NamedTuple):
    """One that could be begun."""

    at: At
    failed: pa.Table


def again_key(place: str, generation: int) -> str:
    return layout.RETRY.at(list=place, generation=generation)


def retries(store: Store, place: str) -> list[RetryRecord]:
    """What each generation after the first tries again."""
    found: list[RetryRecord] = []
    while store.exists(key := again_key(place, len(found) + 1)):
        found.append(read_record(store, key, RetryRecord))
    return found


def retry(store: Store, name: str, place: str, states: Mapping[str, State]) -> Retry | None:
    """What failed in the newest generation of the list `name`; None if nothing of it was tried. Nothing is written."""
    before = retries(store, place)
    newest = At(place, len(before))
    record = links.read_links(store, newest)
    if record is None:  # also where a generation has just been begun, for another stage or source with the same list
        return None
    failed = pa.concat_tables([FAILED.empty_table(), *_Failed(store, name, states).of(record)])
    if before:
        rows = read_parquet(store, before[-1].table, ["row"])["row"]
        failed = pa.table([rows.take(failed["row"]), failed["cause"]], schema=FAILED)
    return Retry(At(place, newest.generation + 1), failed)


def begin(store: Store, found: Retry) -> int:
    """Let the next `prepare` try again; how many rows that are."""
    if not found.failed.num_rows:
        return 0
    record = RetryRecord(
        table=put_data(store, layout.ORIGINALS.at(), "again.parquet", parquet_bytes(found.failed)),
        rows=found.failed.num_rows,
        causes=dict(sorted(Counter(found.failed["cause"].to_pylist()).items())),
    )
    first = write_record(store, again_key(found.at.place, found.at.generation), record)
    return record.rows if first else 0


class _Failed:
    """The rows of a list, counted from its first, that failed for causes that can pass."""

    def __init__(self, store: Store, name: str, states: Mapping[str, State]) -> None:
        self._store, self._name, self._states = store, name, states
        self._causes: dict[str, pa.Array | None] = {}

    def of(self, record: LinksRecord) -> Iterator[pa.Table]:
        with links.opened(self._store, record) as file:
            for first in range(0, record.rows, links.GROUP):
                here = file.slice(first, min(links.GROUP, record.rows - first))
                new = [name for name in here.names if name not in self._causes]
                self._causes |= zip(new, in_order(self._read, new), strict=True)
                causes = np.full(len(here.codes), None, object)
                for number, name in enumerate(here.names):
                    if (known := self._causes[name]) is not None:
                        rows = np.flatnonzero(here.codes == number)
                        causes[rows] = known.take(pa.array(here.at[rows])).to_pylist()
                rows = np.flatnonzero(causes)
                yield pa.table([pa.array(first + rows), pa.array(causes[rows], pa.string())], schema=FAILED)

    def _read(self, batch: str) -> pa.Array | None:
        """The causes in a batch that can pass, null for the others; None where there are none."""
        state = self._states.get(batch, originals.NOTHING)
        if state.attempt < 0:
            raise DataError(f"the downloads of {self._name} are not finished", remedy="prepare without a retry first")
        record = originals.read_batch(self._store, batch, state.attempt)
        if not TRANSIENT & record.rejected.keys():
            return None
        causes = originals.read_index(self._store, record, ["cause"])["cause"].combine_chunks()
        return pc.if_else(pc.is_in(causes, pa.array([cause.value for cause in TRANSIENT])), causes, None)


def rows_again(store: Store, source: UrlSource, whole: Range, again: RetryRecord) -> str:
    """A table in the store of the rows that are tried again, with the columns that the source asks for today."""
    rows = read_parquet(store, again.table, ["row"])["row"].to_numpy()
    with tempfile.TemporaryDirectory(prefix="pixnerd-again-") as folder, ExitStack() as files:
        file = files.enter_context(parquet.opened(parquet.open_rows(source, store, whole), whole.table))
        path, first = Path(folder, "again"), 0
        own = [pa.field(DAMAGE, pa.string())] * (DAMAGE not in file.schema_arrow.names)
        schema = pa.schema([*file.schema_arrow, *own, pa.field(ROW, pa.int64())])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in parquet.filled(file, whole.table, BATCH, whole=whole.in_store):
                begin, end = np.searchsorted(rows, [first, first + batch.num_rows])
                chosen = rows[begin:end]
                if len(chosen):
                    part = batch.take(pa.array(chosen - first)).append_column(ROW, pa.array(chosen))
                    writer.write_table(part.cast(schema))
                first += batch.num_rows
        return put_data(store, layout.TABLES.at(), f"{source.name}.parquet", path).key

"""A dataset version: which samples, with which captions, and which are held out. What training reads.

The filter (see data_prep.filters) is over the index's columns, the corpus's kept ones, and `duplicate`. Memory holds
one shard's index at a time, and four columns of all of them where the filter asks for duplicates.

A sample is held out by its key alone, so it is held out of every snapshot with at least that fraction, whatever the
filter, and a later and larger corpus moves none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from data_prep import dedup
from data_prep.filters import LONGEST, apply, columns_in, parse_filter
from data_prep.plan import read_plan
from infra.config import Settings, digest, nearest
from infra.errors import DataError, SettingsError
from infra.records import ShardRecord, SnapshotRecord, put_data, read_record, write_record
from infra.shards import SELECTION_SCHEMA, list_shards, read_index, shard_prefix
from infra.store import Store

Weight = Annotated[float, Field(ge=0, le=1e6)]
Tables = tuple[pa.Table, pa.Table]  # (training, held out)

FORMAT = 1  # raised when the same shards and settings would give another selection
KEY_DIGITS = 8  # of a key's hex digits decide whether it is held out: keys are hashes already


class SnapshotSettings(Settings):
    size: int = Field(256, description="one of the sizes that were prepared")
    filter: str = Field("", max_length=LONGEST)
    captions: dict[str, Weight] = Field({}, description="kind -> weight; none: all kinds alike")
    held_out: float = Field(0.0, ge=0, lt=1, description="fraction of the samples that training never sees")


def snapshot_key(plan: str, settings: SnapshotSettings) -> str:
    name = digest({"format": FORMAT, "plan": plan, "settings": settings.results()})
    return f"snapshots/{name}.json"


def snapshot(store: Store, plan: str, settings: SnapshotSettings) -> SnapshotRecord:
    """Make the snapshot of a finished plan's shards, or read it if it is there."""
    key = snapshot_key(plan, settings)
    if store.exists(key):
        return read_record(store, key, SnapshotRecord)
    shards = _all_shards(store, plan, str(settings.size))
    selection = _Selection(store, shards, settings)
    name = Path(key).stem
    with TemporaryDirectory(prefix="pixnerd-snapshot-") as folder:
        paths = [Path(folder, part) for part in ("selection", "held-out")]
        rows = _write(paths, selection.parts())
        record = SnapshotRecord(
            shards=shard_prefix(plan, str(settings.size)),
            size=str(settings.size),
            selection=put_data(store, "data/snapshots", f"{name}-selection.parquet", paths[0]),
            held_out=put_data(store, "data/snapshots", f"{name}-held-out.parquet", paths[1]),
            rows=rows[0],
            held_out_rows=rows[1],
            counts=selection.counts(),
        )
    return record if write_record(store, key, record) else read_record(store, key, SnapshotRecord)


def _all_shards(store: Store, plan: str, size: str) -> list[ShardRecord]:
    shards = list(list_shards(store, shard_prefix(plan, size)))
    planned = len(read_plan(store, plan).shards)
    if not shards:
        raise DataError(f"plan {plan} has no shards of size {size}", remedy="prepare that size first")
    if len(shards) < planned:
        raise DataError(f"only {len(shards)} of {planned} shards are there", remedy="run prepare again to finish them")
    return shards


def _write(paths: Sequence[Path], parts: Iterator[Tables]) -> list[int]:
    """Write each part's rows as they come; the number of rows in each file."""
    rows = [0, 0]
    with ExitStack() as files:
        writers = [files.enter_context(pq.ParquetWriter(path, SELECTION_SCHEMA, compression="zstd")) for path in paths]
        for tables in parts:
            for number, table in enumerate(tables):
                if table.num_rows:
                    writers[number].write_table(table)
                    rows[number] += table.num_rows
    return rows


class _Selection:
    """The samples of each shard in turn, counted on the way."""

    def __init__(self, store: Store, shards: list[ShardRecord], settings: SnapshotSettings) -> None:
        self.store, self.shards, self.mix = store, shards, settings.captions
        self.threshold = f"{int(settings.held_out * 16**KEY_DIGITS):0{KEY_DIGITS}x}"
        named = columns_in(settings.filter)
        schema, rows = _survey(store, shards, duplicates="duplicate" in named)
        self.duplicate = dedup.duplicates(rows) if rows is not None else None
        self.schema = schema.append(pa.field("duplicate", pa.bool_()))
        self.conditions = parse_filter(settings.filter, self.schema)
        self.passed = [0] * (2 + len(self.conditions))  # accepted, after each condition, with a caption
        self.kinds: set[str] = set()

    def counts(self) -> list[tuple[str, int]]:
        labels = ["accepted", *(condition.text for condition in self.conditions), "has a caption of the mix"]
        return list(zip(labels, self.passed, strict=True))

    def parts(self) -> Iterator[Tables]:
        first = 0
        for shard in self.shards:
            table = read_index(self.store, shard)
            mark = np.zeros(table.num_rows, bool)
            if self.duplicate is not None:
                mark = self.duplicate[first : first + table.num_rows]
            first += table.num_rows
            if shard.tar is None:
                continue
            samples = self._captioned(self._passing(table.append_column("duplicate", pa.array(mark))), shard.tar.key)
            held_out = pc.less(samples["key"], self.threshold)
            yield samples.filter(pc.invert(held_out)), samples.filter(held_out)
        self._check()

    def _passing(self, table: pa.Table) -> pa.Table:
        table = pa.concat_tables([self.schema.empty_table(), table], promote_options="default")
        table = table.filter(pc.field("accepted"))
        self.passed[0] += table.num_rows
        for number, condition in enumerate(self.conditions, start=1):
            table = apply(table, condition)
            self.passed[number] += table.num_rows
        return table

    def _captioned(self, table: pa.Table, tar: str) -> pa.Table:
        captions, weights, kinds = caption_mix(table["captions"].combine_chunks(), self.mix)
        self.kinds |= kinds
        columns = {
            "key": table["key"],
            "tar": pa.DictionaryArray.from_arrays(pa.array(np.zeros(table.num_rows, np.int32)), [tar]),
            "captions": captions,
            "caption_weights": weights,
        }
        columns |= {name: table[name] for name in ("offset", "length", "width", "height")}
        samples = pa.table([columns[name] for name in SELECTION_SCHEMA.names], schema=SELECTION_SCHEMA)
        samples = samples.filter(pc.greater(pc.list_value_length(samples["captions"]), 0))
        self.passed[-1] += samples.num_rows
        return samples

    def _check(self) -> None:
        for kind in self.mix:
            if kind not in self.kinds and self.passed[-2]:
                near = nearest(kind, self.kinds)
                raise SettingsError(
                    f"no sample has a caption of the kind `{kind}`",
                    remedy=f"did you mean `{near}`?" if near else f"kinds: {', '.join(sorted(self.kinds))}",
                )
        if not self.passed[-1]:
            steps = ", ".join(f"{label}: {count}" for label, count in self.counts())
            raise DataError(f"no sample is left ({steps})", remedy="loosen the filter or the caption mix")


def _survey(store: Store, shards: list[ShardRecord], *, duplicates: bool) -> tuple[pa.Schema, pa.Table | None]:
    """The columns of all indexes together, and what finding duplicates needs of their rows."""
    schemas: dict[str, pa.Schema] = {}
    rows = []
    for shard in shards:
        table = read_index(store, shard)
        schemas[str(table.schema)] = table.schema
        if duplicates:
            rows.append(table.select(dedup.COLUMNS))
    try:
        schema = pa.unify_schemas([schemas[name] for name in sorted(schemas)])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"two sources keep a column of one name and two types ({error})", remedy="rename one") from None
    return schema, pa.concat_tables(rows) if duplicates else None


def caption_mix(captions: pa.ListArray, mix: Mapping[str, float]) -> tuple[pa.ListArray, pa.ListArray, set[str]]:
    """Each row's texts and their weights under the mix, which sum to 1, and the kinds that were met.

    A kind's weight is shared by a row's captions of that kind; no mix means that all kinds weigh the same.
    """
    rows = len(captions)
    row_C = pc.list_parent_indices(captions).to_numpy()  # C captions
    flat = captions.flatten()
    kinds = flat.field("kind").dictionary_encode()
    names = kinds.dictionary.to_pylist()
    kind_C = kinds.indices.to_numpy()
    weight_C = np.array([mix.get(name, 0.0) if mix else 1.0 for name in names] or [0.0])[kind_C]
    _, group_C, size = np.unique(row_C * max(len(names), 1) + kind_C, return_inverse=True, return_counts=True)
    weight_C = weight_C / size[group_C]
    total = np.bincount(row_C, weight_C, rows)
    kept = np.flatnonzero(weight_C > 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(row_C[kept], minlength=rows))]), pa.int32())
    share = (weight_C[kept] / total[row_C[kept]]).astype(np.float32)
    texts = flat.field("text").take(pa.array(kept))
    return pa.ListArray.from_arrays(offsets, texts), pa.ListArray.from_arrays(offsets, pa.array(share)), set(names)

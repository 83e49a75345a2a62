"""Makes a snapshot, the version of a dataset that training reads: samples, how often, their captions, and the split.

    shards  ->  accepted  ->  not forgotten  ->  each condition of the filter  ->  has a caption of the mix, or a label
            ->  held out, or training: as often as its source weighs

The filter (see `filters`) can name the columns of the index, those that the corpus kept, those of the named scores, and
`duplicate`; `captions` has the mix. Shards are read a few at a time and written as they come, so memory holds the
tables of a few shards and, if the filter asks for duplicates, some numbers of every row (see `dedup`). If no row is
left for training, that is an error and no snapshot is made.

The key alone decides whether a sample is held out: then it is held out of every snapshot with at least that fraction,
whatever the filter and the weights, and also when the corpus grows. `not duplicate` leaves one of every group of
duplicates, over all sources and both halves of the split, so a held-out sample has no duplicate in training. Duplicates
are found among all accepted samples, forgotten ones too, so that forgetting an item never brings in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.prepare.plan import Plan, all_shards, read_plan
from data_prep.scores.job import SideTables
from data_prep.snapshots import dedup
from data_prep.snapshots.captions import Bools, Ints, Mixed, appended, caption_mix
from data_prep.snapshots.columns import columns_of, with_columns
from data_prep.snapshots.filters import columns_in, masks, parse_filter
from data_prep.snapshots.forget import ForgottenItems, concerning
from data_prep.snapshots.labels import check_labels, labels
from data_prep.snapshots.settings import SnapshotSettings, wrongs
from data_prep.snapshots.tally import ACCEPTED, BY_SHARD, LABELLED, MIXED, REMEMBERED, WEIGHTED, Part, Tally
from data_prep.sources.reading import in_order
from infra import layout
from infra.config import digest
from infra.errors import SettingsError
from infra.records import ShardRecord, SnapshotRecord, put_data, read_record, recorded
from infra.shards import SPLIT_DIGITS, read_index, selection_schema, shard_prefix
from infra.store import Store

FORMAT = 1  # raised when the same shards and settings would give another selection
ROW_GROUP = 1 << 16  # rows of a selection that are written together, at least
# The columns that are read of an index, besides those that the filter names.
NEEDED = ("key", "source", "accepted", "captions", "offset", "length", "width", "height")


def snapshot_key(plan: str, edition: str, settings: SnapshotSettings, forgotten: Sequence[str] = ()) -> str:
    """`forgotten`: the lists that may concern its shards, as in its record. Only these lists change the key."""
    work = {"format": FORMAT, "plan": plan, "edition": edition, "settings": settings.chosen()}
    return layout.SNAPSHOT.at(digest=digest(work | ({"forgotten": list(forgotten)} if forgotten else {})))


def snapshot(store: Store, plan: str, edition: str, settings: SnapshotSettings) -> SnapshotRecord:
    """Make the snapshot of the shards of an edition of a plan, or read its record if it exists."""
    planned, size = read_plan(store, plan, edition), str(settings.size)
    forgotten = ForgottenItems(store, concerning(store, planned, size))
    key = snapshot_key(plan, edition, settings, forgotten.lists)
    if store.exists(key):
        return read_record(store, key, SnapshotRecord)
    shards = all_shards(store, planned, size)
    for wrong in wrongs(settings, {shard.source for shard in planned.shards}):
        raise SettingsError(f"`{wrong.field}` {wrong.message}", remedy=wrong.remedy)
    selection = _Selection(store, planned, shards, settings, forgotten)
    name = Path(key).stem
    with TemporaryDirectory(prefix="pixnerd-snapshot-") as folder:
        paths = [Path(folder, half) for half in ("selection", "held-out")]
        rows = _write(paths, selection.parts(), selection_schema(settings.labels is not None))
        record = SnapshotRecord(
            shards=shard_prefix(plan, size),
            size=size,
            selection=put_data(store, layout.SELECTIONS.at(), f"{name}-selection.parquet", paths[0]),
            held_out=put_data(store, layout.SELECTIONS.at(), f"{name}-held-out.parquet", paths[1]),
            by_shard=put_data(store, layout.SELECTIONS.at(), f"{name}-by-shard.parquet", selection.tally.by_shard()),
            rows=rows[0],
            held_out_rows=rows[1],
            counts=selection.tally.counts(),
            by_source=selection.tally.by_source(),
            caption_shares=selection.tally.caption_shares(),
            forgotten=forgotten.lists,
        )
    record = recorded(store, key, record)
    if list(concerning(store, planned, size)) != forgotten.lists:
        return snapshot(store, plan, edition, settings)  # an item was forgotten meanwhile, and may be in it
    return record


def _write(paths: Sequence[Path], parts: Iterable[Part], schema: pa.Schema) -> list[int]:
    """Write the rows of both halves of the split as they come, in row groups; return the number of rows of each."""
    rows = [0, 0]
    waiting: list[list[pa.RecordBatch]] = [[], []]
    with ExitStack() as files:
        writers = [files.enter_context(pq.ParquetWriter(path, schema, compression="zstd")) for path in paths]

        def flush(number: int) -> None:
            if waiting[number]:
                table = pa.Table.from_batches(waiting[number]).unify_dictionaries().combine_chunks()
                writers[number].write_table(table, row_group_size=len(table))
                waiting[number].clear()

        for part in parts:
            for number, samples in enumerate((part.training, part.held_out)):
                if samples.num_rows:
                    waiting[number].append(samples)
                    rows[number] += samples.num_rows
                if sum(batch.num_rows for batch in waiting[number]) >= ROW_GROUP:
                    flush(number)
        for number in range(2):
            flush(number)
    return rows


# ------------------------------------------------------------------------------------------------ shard by shard


class _Selection:
    """Selects the samples of each shard in turn, and counts what each step leaves."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        shards: list[ShardRecord],
        settings: SnapshotSettings,
        forgotten: ForgottenItems,
    ) -> None:
        self.store, self.shards, self.settings, self.forgotten = store, shards, settings, forgotten
        self.first = np.cumsum([0, *(shard.inputs for shard in shards)])  # row of each shard among all rows
        self.labels = settings.labels
        self.asked = columns_in(settings.filter) | ({settings.labels.column} if settings.labels else set())
        self.scores = SideTables(store, plan, shards[0].size, shards, settings.scores)
        self.names, schema = columns_of(store, shards, settings.readers, self.asked)
        self.schema = with_columns(schema, [pa.field("duplicate", pa.bool_()), *self.scores.fields], self.asked)
        self.conditions = parse_filter(settings.filter, self.schema)
        if self.labels is not None:
            check_labels(self.labels, self.schema)
        self.duplicate = self._read_all("duplicate" in self.asked)
        remembered, weighted = [REMEMBERED] * bool(forgotten), [WEIGHTED] * bool(settings.weights)
        texts = [condition.text for condition in self.conditions]
        self.tally = Tally([ACCEPTED, *remembered, *texts, LABELLED if self.labels else MIXED, *weighted])

    def _read_all(self, duplicates: bool) -> Bools | None:
        """Read all rows once before the selection, if it needs duplicates or the pixels of forgotten items."""
        if not duplicates and not self.forgotten:
            return None
        rows = dedup.Rows(self.settings.duplicates)
        columns = dedup.columns(self.settings.duplicates) if duplicates else ("key", "pixels_sha256")
        for table in in_order(partial(read_index, self.store, columns=columns), self.shards, self.settings.readers):
            self.forgotten.learn(table)
            if duplicates:
                rows.add(table)
        return rows.duplicates() if duplicates else None

    def parts(self) -> Iterator[Part]:
        numbers = [number for number, shard in enumerate(self.shards) if shard.tar is not None]
        for part in in_order(self._part, numbers, self.settings.readers):
            self.tally.add(part)
            yield part
        self.tally.check(self.settings, sum((Counter(shard.rejected) for shard in self.shards), Counter()))

    def _part(self, number: int) -> Part:
        table = self._accepted(number)
        filtered, captions = self._with_scores(number, table)
        accepted = _samples(table, self.shards[number])
        sources, code = _names(accepted)
        left = np.ones(table.num_rows, bool)
        counts = [_by_source(accepted)]
        remembered = [~self.forgotten.mask(table)] if self.forgotten else []
        for passed in [*remembered, *masks(filtered, self.conditions)]:
            left &= passed
            counts.append(np.bincount(code[left], minlength=len(sources)))
        of_rows = None
        if self.labels is not None:
            of_rows = labels(filtered[self.labels.column].filter(pa.array(left)), self.labels)
            left[left] = of_rows.is_valid().to_numpy(zero_copy_only=False)
        selected = accepted.filter(pa.array(left))
        mixed = caption_mix(captions.filter(pa.array(left)), self.settings.captions, selected["source"])
        captioned = pc.list_value_length(mixed.texts).to_numpy() > 0
        if of_rows is None:
            selected = _with(selected, selection_schema(), mixed).filter(pa.array(captioned))
            captioned = captioned[captioned]
        else:
            selected = _with(selected, selection_schema(labelled=True), mixed, label=of_rows.drop_null())
        counts.append(_by_source(selected))
        held_out = _digits(selected["key"], 0) < _below(self.settings.held_out)
        times = np.where(held_out, 0, _times(selected, self.settings.weights))
        halves = selected.take(pa.array(np.repeat(np.arange(len(times)), times))), selected.filter(pa.array(held_out))
        if self.settings.weights:
            counts.append(_by_source(halves[0]) + _by_source(halves[1]))
        return Part(
            *halves,
            by_source={name: [int(count[k]) for count in counts] for k, name in enumerate(sources)},
            by_shard=_by_bucket(self.shards[number].number, accepted, *halves),
            kinds=mixed.kinds,
            shares=mixed.shares(times[captioned]),
        )

    def _accepted(self, number: int) -> pa.Table:
        """The accepted rows of a shard's index, with the columns that are needed and `duplicate`."""
        needed = {*NEEDED, *self.asked, *(["pixels_sha256"] if self.forgotten else [])}
        columns = [name for name in self.names[number] if name in needed]
        table = read_index(self.store, self.shards[number], columns)
        mark = np.zeros(table.num_rows, bool)
        if self.duplicate is not None:
            mark = self.duplicate[self.first[number] : self.first[number + 1]]
        table = table.append_column("duplicate", pa.array(mark))
        return table.filter(table["accepted"])

    def _with_scores(self, number: int, table: pa.Table) -> tuple[pa.Table, pa.ListArray]:
        """The columns that the filter names, and all captions; both include those of the side tables."""
        captions = table["captions"].combine_chunks()
        for scores in self.scores.read(self.shards[number].number, table["key"]):
            if "captions" in scores.column_names:
                captions = appended(captions, scores["captions"].combine_chunks())
            for name in self.asked & set(scores.column_names) - {"key"}:
                table = table.append_column(name, scores[name])
        fields = [field for field in self.schema if field.name in self.asked or field.name == "key"]
        present = set(table.column_names)
        columns = [
            table[field.name].cast(field.type) if field.name in present else pa.nulls(table.num_rows, field.type)
            for field in fields
        ]
        return pa.table(columns, names=[field.name for field in fields]), captions


def _samples(table: pa.Table, shard: ShardRecord) -> pa.RecordBatch:
    """The rows in the columns of a selection, except its captions."""
    assert shard.tar is not None
    width, height = (table[side].to_numpy().astype(np.int64) for side in ("width", "height"))
    sides, bucket = np.unique(width << 32 | height, return_inverse=True)
    names = [f"{int(side) >> 32}x{int(side) & 0xFFFFFFFF}" for side in sides]
    columns = {name: table[name].combine_chunks() for name in ("key", "offset", "length", "width", "height")}
    columns |= {
        "tar": pa.DictionaryArray.from_arrays(np.zeros(table.num_rows, np.int32), [shard.tar.key]),
        "source": table["source"].combine_chunks().dictionary_encode(),
        "bucket": pa.DictionaryArray.from_arrays(bucket.astype(np.int32), pa.array(names, pa.string())),
    }
    return pa.record_batch(columns)


def _with(samples: pa.RecordBatch, schema: pa.Schema, mixed: Mixed, **further: pa.Array) -> pa.RecordBatch:
    """The samples with their captions, if they have some, and further columns."""
    columns = {name: samples[name] for name in samples.schema.names} | further
    columns |= {"captions": mixed.texts, "caption_weights": mixed.weights}
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _digits(keys: pa.Array, first: int) -> Ints:
    """SPLIT_DIGITS of each key's hex digits, from the digit `first` on, as a number."""
    digits = pc.utf8_slice_codeunits(keys, first, first + SPLIT_DIGITS)
    numbers: Ints = pc.cast(pc.binary_join_element_wise("0x", digits, ""), pa.int64()).to_numpy()
    return numbers


def _below(fraction: float) -> int:
    """The limit below which this fraction of all values of `_digits` lies."""
    return int(fraction * 16**SPLIT_DIGITS)


def _times(samples: pa.RecordBatch, weights: Mapping[str, float]) -> Ints:
    """How often training lists each row: the weight of its source, rounded down or up as the key decides.

    A weight of 2.25 lists each sample twice, and a quarter of them a third time.
    """
    if not weights:
        return np.ones(samples.num_rows, np.int64)
    names, code = _names(samples)
    weight = np.array([weights.get(name, 1.0) for name in names] or [1.0])
    whole = np.floor(weight).astype(np.int64)
    limit = np.array([_below(fraction) for fraction in weight - whole])
    times: Ints = whole[code] + (_digits(samples["key"], SPLIT_DIGITS) < limit[code])
    return times


def _names(samples: pa.RecordBatch, column: str = "source") -> tuple[list[str], Ints]:
    """The dictionary of a dictionary-encoded column, and each row's index in it."""
    values = samples[column]
    return values.dictionary.to_pylist(), values.indices.to_numpy()


def _by_source(samples: pa.RecordBatch) -> Ints:
    """The number of rows of each source."""
    names, code = _names(samples)
    return np.bincount(code, minlength=len(names))


def _by_bucket(number: int, *batches: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of BY_SHARD for one shard; each batch gives one count, and all of them share their dictionaries."""
    (sources, _), (buckets, _) = _names(batches[0]), _names(batches[0], "bucket")
    counts = []
    for batch in batches:
        code = _names(batch)[1] * len(buckets) + _names(batch, "bucket")[1]
        counts.append(np.bincount(code, minlength=len(sources) * len(buckets)))
    return [
        dict(zip(BY_SHARD.names, (number, source, bucket, *(int(count[k]) for count in counts)), strict=True))
        for k, (source, bucket) in enumerate(product(sources, buckets))
        if counts[0][k]
    ]

"""A dataset version: which samples, how often, with which captions, and which are held out. What training reads.

    shards  ->  accepted  ->  not forgotten  ->  each condition of the filter  ->  a caption of the mix
            ->  held out, or training: as often as its source weighs

The filter (see `filters`) is over the index's columns, the corpus's kept ones, those of the scores that are
named, and `duplicate`. Shards are read one after another, a few ahead, and written as they come, so memory holds a few
shards' tables, and what finding duplicates needs of every row where the filter asks for them (see `dedup`).
The mix is in `captions`. A snapshot that leaves training no row is an error, and none is made.

A sample is held out by its key alone, so it is held out of every snapshot with at least that fraction, whatever the
filter and the weights, and a later and larger corpus moves none. `not duplicate` leaves one of every group of
duplicates, over all sources and both parts of the split: what is held out then has no twin in training. Duplicates are
found among all accepted samples, forgotten ones too, so forgetting an item never brings in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from data_prep.prepare.plan import all_shards, read_plan
from data_prep.rejections import counted, remedy
from data_prep.scores.job import SideTables
from data_prep.snapshots import dedup
from data_prep.snapshots.captions import Bools, Ints, Mix, Mixed, appended, caption_mix, rules_of
from data_prep.snapshots.filters import LONGEST, columns_in, masks, parse_filter
from data_prep.snapshots.forget import Gone, concerning
from data_prep.sources.reading import READERS, in_order
from infra import layout
from infra.config import Settings, digest, nearest, operational
from infra.errors import DataError, SettingsError
from infra.problems import Wrong
from infra.records import ShardRecord, SnapshotRecord, put_data, read_record, write_record
from infra.shards import SELECTION_SCHEMA, SPLIT_DIGITS, parquet_bytes, read_index, shard_prefix
from infra.store import Store

Times = Annotated[float, Field(ge=0, le=100)]

FORMAT = 1  # raised when the same shards and settings would give another selection
ROW_GROUP = 1 << 16  # rows of a selection that are written together, at least
FOOTER = 1 << 16  # bytes at the end of an index: they tell its columns

# The steps that rows are counted after, besides the filter's conditions, and what helps where one takes all of them.
ACCEPTED, REMEMBERED, MIXED = "accepted", "not forgotten", "has a caption of the mix"
WEIGHTED, HELD_OUT = "as often as its source weighs", "not held out"
REMEDIES = {
    ACCEPTED: "check each source's `url`, and what lies there",
    REMEMBERED: "prepare images that nobody asked to forget",
    MIXED: "give `captions` a kind, a source or a length that they have",
    WEIGHTED: "give `weights` more for the sources that are left",
    HELD_OUT: "lower `held_out`, or prepare more images",
}

# What is read of an index, besides the columns that the filter names.
NEEDED = ("key", "source", "accepted", "captions", "offset", "length", "width", "height")

BY_SHARD = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("accepted", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("held_out_rows", pa.int64(), nullable=False),
    ]
)


class SnapshotSettings(Settings):
    size: int | str = Field(256, description="one of the sizes that were prepared: a side, or a bucket set's name")
    filter: str = Field("", max_length=LONGEST)
    duplicates: int | None = Field(
        None,
        ge=0,
        le=dedup.FARTHEST,
        description="the filter's `duplicate` also means pictures whose perceptual hashes differ in so many bits",
    )
    scores: list[str] = Field([], description="digests of scores and captions that are joined to the index")
    weights: dict[str, Times] = Field({}, description="source -> how often training lists each of its samples; 1")
    captions: Mix = Field({}, description="kind -> weight, or a list of rules; none: all kinds alike")
    held_out: float = Field(0.0, ge=0, lt=1, description="fraction of the samples that training never sees")
    readers: int = operational(READERS, ge=1, description="shards that are read at once")

    @field_validator("scores")
    @classmethod
    def _distinct(cls, found: list[str]) -> list[str]:
        if len(set(found)) < len(found):
            raise ValueError("one of the scores is named twice")
        return found

    @field_validator("size")
    @classmethod
    def _side(cls, found: int | str) -> int | str:
        return int(found) if isinstance(found, str) and found.isascii() and found.isdigit() else found


def snapshot_key(plan: str, edition: str, settings: SnapshotSettings, forgotten: Sequence[str] = ()) -> str:
    """`forgotten`: the lists that may concern its shards, as its record tells. Others do not make it another one."""
    work = {"format": FORMAT, "plan": plan, "edition": edition, "settings": settings.chosen()}
    return layout.SNAPSHOT.at(digest=digest(work | ({"forgotten": list(forgotten)} if forgotten else {})))


def snapshot(store: Store, plan: str, edition: str, settings: SnapshotSettings) -> SnapshotRecord:
    """Make the snapshot of the shards of an edition of a plan, or read it if it is there."""
    planned = read_plan(store, plan, edition)
    gone = Gone(store, concerning(store, planned, str(settings.size)))
    key = snapshot_key(plan, edition, settings, gone.lists)
    if store.exists(key):
        return read_record(store, key, SnapshotRecord)
    shards = all_shards(store, planned, str(settings.size))
    for wrong in wrongs(settings, {shard.source for shard in planned.shards}):
        raise SettingsError(f"`{wrong.field}` {wrong.message}", remedy=wrong.remedy)
    selection = _Selection(store, shards, settings, gone)
    name = Path(key).stem
    with TemporaryDirectory(prefix="pixnerd-snapshot-") as folder:
        paths = [Path(folder, part) for part in ("selection", "held-out")]
        rows = _write(paths, selection.parts())
        record = SnapshotRecord(
            shards=shard_prefix(plan, str(settings.size)),
            size=str(settings.size),
            selection=put_data(store, layout.SELECTIONS.at(), f"{name}-selection.parquet", paths[0]),
            held_out=put_data(store, layout.SELECTIONS.at(), f"{name}-held-out.parquet", paths[1]),
            by_shard=put_data(store, layout.SELECTIONS.at(), f"{name}-by-shard.parquet", selection.tally.by_shard()),
            rows=rows[0],
            held_out_rows=rows[1],
            counts=selection.tally.counts(),
            by_source=selection.tally.by_source(),
            caption_shares=selection.tally.caption_shares(),
            forgotten=gone.lists,
        )
    if not write_record(store, key, record):
        record = read_record(store, key, SnapshotRecord)
    if list(concerning(store, planned, str(settings.size))) != gone.lists:
        return snapshot(store, plan, edition, settings)  # something was forgotten meanwhile, and may be in it
    return record


def wrongs(settings: SnapshotSettings, sources: Collection[str]) -> Iterator[Wrong]:
    """What does not go together, in shards of these sources."""
    if settings.duplicates is not None and "duplicate" not in columns_in(settings.filter):
        yield Wrong(
            "duplicates", "is set, but the filter does not ask", "add `not duplicate` to the filter, or unset it"
        )
    weighed = [(f"weights.{name}", name) for name in settings.weights]
    rules = [(f"captions.{number}.source", rule.source) for number, rule in enumerate(rules_of(settings.captions))]
    for field, name in [*weighed, *rules]:
        if name is not None and name not in sources:
            near = nearest(name, sources)
            remedy = f"did you mean `{near}`?" if near else f"sources: {', '.join(sorted(sources))}"
            yield Wrong(field, f"means a source called `{name}`, of which there are no shards", remedy)


def _write(paths: Sequence[Path], parts: Iterable[Part]) -> list[int]:
    """Write the rows of both halves of the split as they come, in groups; the number of rows in each file."""
    rows = [0, 0]
    waiting: list[list[pa.RecordBatch]] = [[], []]
    with ExitStack() as files:
        writers = [files.enter_context(pq.ParquetWriter(path, SELECTION_SCHEMA, compression="zstd")) for path in paths]

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


class Part(NamedTuple):
    """What a snapshot takes of one shard, and how it came to it."""

    training: pa.RecordBatch
    held_out: pa.RecordBatch
    by_source: dict[str, list[int]]  # source -> rows left after each step
    by_shard: list[dict[str, Any]]  # see BY_SHARD
    kinds: set[str]
    shares: dict[str, float]  # of each caption rule in what training draws, times the rows


class _Selection:
    """The samples of each shard in turn, counted on the way."""

    def __init__(self, store: Store, shards: list[ShardRecord], settings: SnapshotSettings, gone: Gone) -> None:
        self.store, self.shards, self.settings, self.gone = store, shards, settings, gone
        self.first = np.cumsum([0, *(shard.inputs for shard in shards)])
        self.asked = columns_in(settings.filter)
        self.scores = SideTables(store, shards[0].plan, shards[0].size, shards, settings.scores)
        self.names, schema = _columns(store, shards, settings.readers, self.asked)
        self.schema = _with_columns(schema, [pa.field("duplicate", pa.bool_()), *self.scores.fields], self.asked)
        self.conditions = parse_filter(settings.filter, self.schema)
        self.duplicate = self._survey("duplicate" in self.asked)
        self.tally = _Tally(self._steps())

    def _steps(self) -> list[str]:
        forgotten = [REMEMBERED] if self.gone else []
        weighted = [WEIGHTED] if self.settings.weights else []
        texts = [condition.text for condition in self.conditions]
        return [ACCEPTED, *forgotten, *texts, MIXED, *weighted]

    def _survey(self, duplicates: bool) -> Bools | None:
        """Go through all rows once before the selection, where something is asked of all of them together."""
        if not duplicates and not self.gone:
            return None
        rows = dedup.Rows(self.settings.duplicates)
        columns = dedup.columns(self.settings.duplicates) if duplicates else ("key", "pixels_sha256")
        for table in in_order(partial(read_index, self.store, columns=columns), self.shards, self.settings.readers):
            self.gone.learn(table)
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
        asked, captions = self._asked(number, table)
        every = _samples(table, self.shards[number])
        sources, code = _names(every)
        left = np.ones(table.num_rows, bool)
        counts = [_by_source(every)]
        for passed in [*([~self.gone.mask(table)] if self.gone else []), *masks(asked, self.conditions)]:
            left &= passed
            counts.append(np.bincount(code[left], minlength=len(sources)))
        chosen = every.filter(pa.array(left))
        mixed = caption_mix(captions.filter(pa.array(left)), self.settings.captions, chosen["source"])
        chosen = _with_captions(chosen, mixed)
        counts.append(_by_source(chosen))
        return self._split(self.shards[number].number, every, chosen, mixed, counts)

    def _split(
        self, number: int, every: pa.RecordBatch, chosen: pa.RecordBatch, mixed: Mixed, counts: list[Ints]
    ) -> Part:
        held_out = _digits(chosen["key"], 0) < _below(self.settings.held_out)
        times = np.where(held_out, 0, _times(chosen, self.settings.weights))
        training = chosen.take(pa.array(np.repeat(np.arange(len(times)), times)))
        apart = chosen.filter(pa.array(held_out))
        if self.settings.weights:
            counts.append(_by_source(training) + _by_source(apart))
        return Part(
            training,
            apart,
            by_source={name: [int(count[k]) for count in counts] for k, name in enumerate(_names(every)[0])},
            by_shard=_by_bucket(number, every, training, apart),
            kinds=mixed.kinds,
            shares=mixed.shares(times),
        )

    def _accepted(self, number: int) -> pa.Table:
        wanted = {*NEEDED, *self.asked, *(["pixels_sha256"] if self.gone else [])}
        columns = [name for name in self.names[number] if name in wanted]
        table = read_index(self.store, self.shards[number], columns)
        mark = np.zeros(table.num_rows, bool)
        if self.duplicate is not None:
            mark = self.duplicate[self.first[number] : self.first[number + 1]]
        table = table.append_column("duplicate", pa.array(mark))
        return table.filter(table["accepted"])

    def _asked(self, number: int, table: pa.Table) -> tuple[pa.Table, pa.ListArray]:
        """What the filter is over, those of the scores among it, and all captions."""
        captions = table["captions"].combine_chunks()
        for scores in self.scores.read(self.shards[number].number, table["key"]):
            if "captions" in scores.column_names:
                captions = appended(captions, scores["captions"].combine_chunks())
            for name in self.asked & set(scores.column_names) - {"key"}:
                table = table.append_column(name, scores[name])
        fields = [field for field in self.schema if field.name in self.asked or field.name == "key"]
        there = set(table.column_names)
        columns = [
            table[field.name].cast(field.type) if field.name in there else pa.nulls(table.num_rows, field.type)
            for field in fields
        ]
        return pa.table(columns, names=[field.name for field in fields]), captions


def _columns(
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


def _with_columns(schema: pa.Schema, fields: Iterable[pa.Field], asked: set[str]) -> pa.Schema:
    for field in fields:
        if field.name not in schema.names:
            schema = schema.append(field)
        elif field.name in asked:
            raise DataError(
                f"two columns of these shards and their scores are called `{field.name}`",
                remedy="keep the corpus's under another name, or name one of the scores only",
            )
    return schema


def _samples(table: pa.Table, shard: ShardRecord) -> pa.RecordBatch:
    """The rows in the columns of a selection, but for its captions."""
    assert shard.tar is not None
    width, height = (table[side].to_numpy().astype(np.int64) for side in ("width", "height"))
    sides, bucket = np.unique(width << 32 | height, return_inverse=True)
    names = [f"{int(side) >> 32}x{int(side) & 0xFFFFFFFF}" for side in sides]
    here = np.zeros(table.num_rows, np.int32)
    columns = {name: table[name].combine_chunks() for name in ("key", "offset", "length", "width", "height")}
    columns |= {
        "tar": pa.DictionaryArray.from_arrays(here, [shard.tar.key]),
        "source": table["source"].combine_chunks().dictionary_encode(),
        "bucket": pa.DictionaryArray.from_arrays(bucket.astype(np.int32), pa.array(names, pa.string())),
    }
    return pa.record_batch(columns)


def _with_captions(samples: pa.RecordBatch, mixed: Mixed) -> pa.RecordBatch:
    columns = {name: samples[name] for name in samples.schema.names}
    columns |= {"captions": mixed.texts, "caption_weights": mixed.weights}
    found = pa.record_batch([columns[name] for name in SELECTION_SCHEMA.names], schema=SELECTION_SCHEMA)
    return found.filter(pc.greater(pc.list_value_length(mixed.texts), 0))


def _digits(keys: pa.Array, first: int) -> Ints:
    """Some of each key's hex digits as a number."""
    digits = pc.utf8_slice_codeunits(keys, first, first + SPLIT_DIGITS)
    numbers: Ints = pc.cast(pc.binary_join_element_wise("0x", digits, ""), pa.int64()).to_numpy()
    return numbers


def _below(fraction: float) -> int:
    """Digits smaller than this are so much of all there are."""
    return int(fraction * 16**SPLIT_DIGITS)


def _times(samples: pa.RecordBatch, weights: Mapping[str, float]) -> Ints:
    """How often training lists each row: as its source weighs, the part after the point decided by the key."""
    if not weights:
        return np.ones(samples.num_rows, np.int64)
    names, code = _names(samples)
    weight = np.array([weights.get(name, 1.0) for name in names] or [1.0])
    whole = np.floor(weight).astype(np.int64)
    limit = np.array([_below(part) for part in weight - whole])
    times: Ints = whole[code] + (_digits(samples["key"], SPLIT_DIGITS) < limit[code])
    return times


def _names(samples: pa.RecordBatch, column: str = "source") -> tuple[list[str], Ints]:
    """The names in a dictionary's column, and each row's number among them."""
    values = samples[column]
    return values.dictionary.to_pylist(), values.indices.to_numpy()


def _by_source(samples: pa.RecordBatch) -> Ints:
    names, code = _names(samples)
    return np.bincount(code, minlength=len(names))


def _by_bucket(number: int, *parts: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of BY_SHARD for one shard; the parts, one for each count, share their dictionaries."""
    (sources, _), (buckets, _) = _names(parts[0]), _names(parts[0], "bucket")
    counts = []
    for part in parts:
        code = _names(part)[1] * len(buckets) + _names(part, "bucket")[1]
        counts.append(np.bincount(code, minlength=len(sources) * len(buckets)))
    return [
        dict(zip(BY_SHARD.names, (number, source, bucket, *(int(count[k]) for count in counts)), strict=True))
        for k, (source, bucket) in enumerate(product(sources, buckets))
        if counts[0][k]
    ]


class _Tally:
    """The counts of all parts together."""

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self._by_source: dict[str, Ints] = {}
        self._by_shard: list[pa.Table] = []
        self._kinds: set[str] = set()
        self._shares: Counter[str] = Counter()
        self._training = self._held_out = 0  # rows

    def add(self, part: Part) -> None:
        for name, counts in part.by_source.items():
            self._by_source[name] = self._by_source.get(name, 0) + np.array(counts)
        self._by_shard.append(pa.Table.from_pylist(part.by_shard, schema=BY_SHARD))
        self._kinds |= part.kinds
        self._shares.update(part.shares)
        self._training += part.training.num_rows
        self._held_out += part.held_out.num_rows

    def counts(self) -> list[tuple[str, int]]:
        total = sum(self._by_source.values(), np.zeros(len(self.steps), np.int64))
        return [(step, int(count)) for step, count in zip(self.steps, total, strict=True)]

    def by_source(self) -> dict[str, list[int]]:
        return {name: counts.tolist() for name, counts in sorted(self._by_source.items())}

    def by_shard(self) -> bytes:
        return parquet_bytes(pa.concat_tables([BY_SHARD.empty_table(), *self._by_shard]).combine_chunks())

    def caption_shares(self) -> dict[str, float]:
        total = sum(self._shares.values())
        return {label: round(share / total, 6) for label, share in sorted(self._shares.items())} if total else {}

    def check(self, settings: SnapshotSettings, rejected: Counter[str]) -> None:
        counts = self.counts()
        before = counts[self.steps.index(MIXED) - 1][1]
        for rule in rules_of(settings.captions):
            if before and rule.kind is not None and rule.kind not in self._kinds:
                near = nearest(rule.kind, self._kinds)
                raise SettingsError(
                    f"no sample has a caption of the kind `{rule.kind}`",
                    remedy=f"did you mean `{near}`?" if near else f"kinds: {', '.join(sorted(self._kinds))}",
                )
        if not self._training:
            raise self._nothing_left(counts, rejected)

    def _nothing_left(self, counts: list[tuple[str, int]], rejected: Counter[str]) -> DataError:
        """An error that names the step after which training has no sample."""
        chosen = dict(counts)[MIXED]
        if chosen and chosen == self._held_out:
            counts = [*counts, (HELD_OUT, 0)]
        elif chosen:
            counts = [*counts[:-1], (WEIGHTED, 0)]
        step = next(label for label, count in counts if not count)
        if step == ACCEPTED and rejected:
            return DataError(f"no image was accepted at this size: {counted(rejected)}", remedy=remedy(rejected))
        said = ", ".join(f"{label}: {count:,}" for label, count in counts)
        return DataError(
            f"no sample is left for training after `{step}` ({said})",
            remedy=REMEDIES.get(step, "loosen that condition of the filter, or leave it out"),
        )

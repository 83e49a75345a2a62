"""A dataset version: which samples, how often, with which captions, and which are held out. What training reads.

    shards  ->  accepted  ->  not forgotten  ->  each condition of the filter  ->  a caption of the mix
            ->  held out, or training: as often as its source weighs

The filter (see data_prep.filters) is over the index's columns, the corpus's kept ones, those of the scores that are
named, and `duplicate`. Shards are read one after another, a few ahead, and written as they come, so memory holds a few
shards' tables, and what finding duplicates needs of every row where the filter asks for them (see data_prep.dedup).

A sample is held out by its key alone, so it is held out of every snapshot with at least that fraction, whatever the
filter and the weights, and a later and larger corpus moves none. `not duplicate` leaves one of every group of
duplicates, over all sources and both parts of the split: what is held out then has no twin in training. Duplicates are
found among all accepted samples, forgotten ones too, so forgetting an item never brings in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Discriminator, Field, Tag, field_validator

from data_prep import dedup
from data_prep.filters import LONGEST, columns_in, masks, parse_filter
from data_prep.forget import Gone
from data_prep.plan import Plan, read_plan
from data_prep.score import Place, read_scores
from data_prep.stream import READERS, in_order
from infra.config import Settings, digest, nearest, operational
from infra.errors import DataError, SettingsError
from infra.records import ShardRecord, SnapshotRecord, put_data, read_record, write_record
from infra.shards import SELECTION_SCHEMA, parquet_bytes, read_index, shard_number, shard_prefix
from infra.store import Store

Weight = Annotated[float, Field(ge=0, le=1e6)]
Times = Annotated[float, Field(ge=0, le=100)]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

FORMAT = 1  # raised when the same shards and settings would give another selection
KEY_DIGITS = 8  # the first of a key's hex digits decide whether it is held out, the next whether it is listed once
#                 more where a weight is no whole number: keys are hashes already
ROW_GROUP = 1 << 16  # rows of a selection that are written together, at least
FOOTER = 1 << 16  # bytes at the end of an index: they tell its columns

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


class CaptionRule(Settings):
    """Captions of this source, kind and length, where those are given; they share the weight among them."""

    weight: Weight
    source: str | None = None
    kind: str | None = None
    words: tuple[int, int | None] | None = Field(None, description="fewest and most, both included; null: no limit")

    @field_validator("words")
    @classmethod
    def _upwards(cls, found: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        if found and found[1] is not None and found[1] < found[0]:
            raise ValueError("the most words are fewer than the fewest")
        return found

    @property
    def label(self) -> str:
        low, high = self.words or (0, None)
        span = [f"{low}-{'' if high is None else high} words"] if self.words else []
        parts = [self.kind, self.source and f"of {self.source}", *span]
        return " ".join(part for part in parts if part) or "any"


# A caption belongs to the first rule that fits it; one that none fits is left out. {kind: weight} is a rule a kind.
Mix = Annotated[
    Annotated[dict[str, Weight], Tag("kinds")] | Annotated[list[CaptionRule], Tag("rules")],
    Discriminator(lambda value: "rules" if isinstance(value, list) else "kinds"),
]


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
    work = {"format": FORMAT, "plan": plan, "edition": edition, "settings": settings.results()}
    return f"snapshots/{digest(work | ({'forgotten': list(forgotten)} if forgotten else {}))}.json"


def snapshot(store: Store, plan: str, edition: str, settings: SnapshotSettings) -> SnapshotRecord:
    """Make the snapshot of the shards of an edition of a plan, or read it if it is there."""
    prefix = shard_prefix(plan, str(settings.size))
    gone = Gone(store, prefix)
    key = snapshot_key(plan, edition, settings, gone.lists)
    if store.exists(key):
        return read_record(store, key, SnapshotRecord)
    planned = read_plan(store, plan, edition)
    shards = all_shards(store, planned, str(settings.size))
    _check(settings, {shard.source for shard in planned.shards})
    selection = _Selection(store, shards, settings, gone)
    name = Path(key).stem
    with TemporaryDirectory(prefix="pixnerd-snapshot-") as folder:
        paths = [Path(folder, part) for part in ("selection", "held-out")]
        rows = _write(paths, selection.parts())
        record = SnapshotRecord(
            shards=prefix,
            size=str(settings.size),
            selection=put_data(store, "data/snapshots", f"{name}-selection.parquet", paths[0]),
            held_out=put_data(store, "data/snapshots", f"{name}-held-out.parquet", paths[1]),
            by_shard=put_data(store, "data/snapshots", f"{name}-by-shard.parquet", selection.tally.by_shard()),
            rows=rows[0],
            held_out_rows=rows[1],
            counts=selection.tally.counts(),
            by_source=selection.tally.by_source(),
            caption_shares=selection.tally.caption_shares(),
            forgotten=gone.lists,
        )
    return record if write_record(store, key, record) else read_record(store, key, SnapshotRecord)


def all_shards(store: Store, plan: Plan, size: str) -> list[ShardRecord]:
    """Those of the plan's edition, which must all be there."""
    if size not in plan.sizes:
        raise DataError(f"plan {plan.digest} has no shards of size {size}", remedy="prepare that size first")
    shards = list(plan.records(store, size))
    planned = len(plan.shards) * plan.sizes[size]
    if len(shards) < planned:
        raise DataError(f"only {len(shards)} of {planned} shards are there", remedy="run prepare again to finish them")
    return shards


def _check(settings: SnapshotSettings, known: set[str]) -> None:
    if settings.duplicates is not None and "duplicate" not in columns_in(settings.filter):
        raise SettingsError(
            "`duplicates` is set, but the filter does not ask", remedy="add `not duplicate` to the filter, or unset it"
        )
    rules = settings.captions if isinstance(settings.captions, list) else []
    for name in [*settings.weights, *(rule.source for rule in rules if rule.source is not None)]:
        if name not in known:
            near = nearest(name, known)
            raise SettingsError(
                f"the shards are of no source called `{name}`",
                remedy=f"did you mean `{near}`?" if near else f"sources: {', '.join(sorted(known))}",
            )


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
        forgotten = ["not forgotten"] if self.gone else []
        weighted = ["as often as its source weighs"] if self.settings.weights else []
        texts = [condition.text for condition in self.conditions]
        return ["accepted", *forgotten, *texts, "has a caption of the mix", *weighted]

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
        self.tally.check(self.settings)

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
                captions = _appended(captions, scores["captions"].combine_chunks())
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
    digits = pc.utf8_slice_codeunits(keys, first, first + KEY_DIGITS)
    numbers: Ints = pc.cast(pc.binary_join_element_wise("0x", digits, ""), pa.int64()).to_numpy()
    return numbers


def _below(fraction: float) -> int:
    """Digits smaller than this are so much of all there are."""
    return int(fraction * 16**KEY_DIGITS)


def _times(samples: pa.RecordBatch, weights: Mapping[str, float]) -> Ints:
    """How often training lists each row: as its source weighs, the part after the point decided by the key."""
    if not weights:
        return np.ones(samples.num_rows, np.int64)
    names, code = _names(samples)
    weight = np.array([weights.get(name, 1.0) for name in names] or [1.0])
    whole = np.floor(weight).astype(np.int64)
    limit = np.array([_below(part) for part in weight - whole])
    times: Ints = whole[code] + (_digits(samples["key"], KEY_DIGITS) < limit[code])
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

    def add(self, part: Part) -> None:
        for name, counts in part.by_source.items():
            self._by_source[name] = self._by_source.get(name, 0) + np.array(counts)
        self._by_shard.append(pa.Table.from_pylist(part.by_shard, schema=BY_SHARD))
        self._kinds |= part.kinds
        self._shares.update(part.shares)

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

    def check(self, settings: SnapshotSettings) -> None:
        counts = self.counts()
        before = counts[self.steps.index("has a caption of the mix") - 1][1]
        for rule in _rules(settings.captions):
            if before and rule.kind is not None and rule.kind not in self._kinds:
                near = nearest(rule.kind, self._kinds)
                raise SettingsError(
                    f"no sample has a caption of the kind `{rule.kind}`",
                    remedy=f"did you mean `{near}`?" if near else f"kinds: {', '.join(sorted(self._kinds))}",
                )
        if not counts[-1][1]:
            steps = ", ".join(f"{label}: {count}" for label, count in counts)
            raise DataError(f"no sample is left ({steps})", remedy="loosen the filter or the caption mix")


# ------------------------------------------------------------------------------------------------ captions


class Mixed(NamedTuple):
    """Each row's texts, and their weights, which sum to 1."""

    texts: pa.ListArray
    weights: pa.ListArray
    kinds: set[str]  # that were met
    rule_C: Ints  # of each text
    rules: list[str]

    def shares(self, times: Ints) -> dict[str, float]:
        """What each rule has of the weights, where each row that has a text counts so many times."""
        length = pc.list_value_length(self.texts).to_numpy()
        times_C = np.repeat(times, length[length > 0])
        totals = np.bincount(self.rule_C, self.weights.flatten().to_numpy() * times_C, len(self.rules))
        return {rule: float(total) for rule, total in zip(self.rules, totals, strict=True) if total}


def caption_mix(captions: pa.ListArray, mix: Mapping[str, float] | list[CaptionRule], source: pa.Array) -> Mixed:
    """A rule's weight is shared by a row's captions of that rule; no mix means that all kinds weigh the same."""
    rows = len(captions)
    row_C = pc.list_parent_indices(captions).to_numpy()  # C captions
    flat = captions.flatten()
    kinds = flat.field("kind").dictionary_encode()
    names = kinds.dictionary.to_pylist()
    rules = _rules(mix) if mix else [CaptionRule(kind=name, weight=1) for name in names]
    rule_C = _rule_of_each(rules, kinds, flat.field("text"), source.take(pa.array(row_C)))
    weight_C = np.array([*(rule.weight for rule in rules), 0.0])[rule_C]
    _, group_C, size = np.unique(row_C * (len(rules) + 1) + rule_C, return_inverse=True, return_counts=True)
    weight_C = weight_C / size[group_C]
    total = np.bincount(row_C, weight_C, rows)
    kept = np.flatnonzero(weight_C > 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(row_C[kept], minlength=rows))]), pa.int32())
    share = pa.array((weight_C[kept] / total[row_C[kept]]).astype(np.float32))
    texts = flat.field("text").take(pa.array(kept))
    return Mixed(
        pa.ListArray.from_arrays(offsets, texts),
        pa.ListArray.from_arrays(offsets, share),
        set(names),
        rule_C[kept],
        [rule.label for rule in rules],
    )


def _rules(mix: Mapping[str, float] | list[CaptionRule]) -> list[CaptionRule]:
    return mix if isinstance(mix, list) else [CaptionRule(kind=kind, weight=weight) for kind, weight in mix.items()]


def _rule_of_each(rules: list[CaptionRule], kinds: pa.DictionaryArray, texts: pa.Array, sources: pa.Array) -> Ints:
    """The number of the first rule that fits each caption, len(rules) where none does."""
    found = np.full(len(texts), len(rules))
    words = None
    for number, rule in reversed(list(enumerate(rules))):
        fits = np.ones(len(texts), bool)
        if rule.kind is not None:
            fits &= _is(kinds, rule.kind)
        if rule.source is not None:
            fits &= _is(sources, rule.source)
        if rule.words is not None:
            words = word_counts(texts) if words is None else words
            low, high = rule.words
            fits &= (words >= low) & (words <= (high if high is not None else words))
        found[fits] = number
    return found


def word_counts(texts: pa.StringArray) -> Ints:
    """How many words each text has, as blanks part them: Chinese or Japanese without blanks is one word."""
    if not len(texts):
        return np.zeros(0, np.int64)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(data or b"", np.uint8) > ord(" ")  # every byte of a letter beyond ASCII is
    begins = letters.copy()
    begins[1:] &= ~letters[:-1]
    starts = ends[:-1][(ends[:-1] < ends[1:])]
    begins[starts] = letters[starts]
    found: Ints = np.diff(np.searchsorted(np.flatnonzero(begins), ends))
    return found


def _is(values: pa.DictionaryArray, name: str) -> Bools:
    names = values.dictionary.to_pylist()
    same: Bools = values.indices.to_numpy() == (names.index(name) if name in names else -1)
    return same


def _appended(captions: pa.ListArray, more: pa.ListArray) -> pa.ListArray:
    """Each row's captions, and after them those of the other list."""
    row_C = np.concatenate([pc.list_parent_indices(part).to_numpy() for part in (captions, more)])
    flat = pa.concat_arrays([captions.flatten(), more.flatten().cast(captions.type.value_type)])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_C, minlength=len(captions)))])
    order = pa.array(np.argsort(row_C, kind="stable"))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.take(order))


# ------------------------------------------------------------------------------------------------ scores


class SideTables:
    """Side tables of scores or captions by their digests, joined to a shard's accepted rows."""

    def __init__(
        self, store: Store, plan: str, size: str, shards: Sequence[ShardRecord], scorers: Sequence[str]
    ) -> None:
        self.store, self.plan, self.size, self.scorers = store, plan, size, scorers
        numbers = {shard.number for shard in shards if shard.tar is not None}
        for scorer in scorers:
            self._check(scorer, numbers)
        tables = self.read(min(numbers)) if numbers else []
        self.fields = [field for table in tables for field in table.schema if field.name not in ("key", "captions")]

    def read(self, number: int, keys: pa.ChunkedArray | None = None) -> list[pa.Table]:
        """Each scorer's table of a shard, whose rows are those of the keys."""
        tables = [read_scores(self.store, self.plan, self.size, scorer, number) for scorer in self.scorers]
        for scorer, table in zip(self.scorers, tables, strict=True):
            if keys is not None and not table["key"].equals(keys):
                raise DataError(
                    f"the scores {scorer} of shard {number} are not of the samples that its index holds",
                    remedy="delete their record and run `score` again",
                )
        return tables

    def _check(self, scorer: str, numbers: set[int]) -> None:
        prefix = Place(self.plan, self.size, scorer).prefix
        there = {shard_number(entry.key) for entry in self.store.list(prefix) if entry.key.endswith(".json")}
        if not there:
            above = prefix[: -len(scorer) - 1]
            others = sorted({entry.key.removeprefix(above).partition("/")[0] for entry in self.store.list(above)})
            raise DataError(
                f"these shards have no scores called `{scorer}`",
                remedy=f"there are {', '.join(others)}" if others else "run `score` first, and name its digest",
            )
        if missing := sorted(numbers - there):
            raise DataError(
                f"{len(missing)} of {len(numbers)} shards have no scores `{scorer}` (the first is {missing[0]})",
                remedy="run that `score` again: it goes on with what is missing",
            )

"""`score`: prepared shards -> side tables of scores or captions, as a pool of Ray actors, one task for each shard.

    scores/<plan>/<size>/<scorer>/00012.json       ScoreRecord, written last
    data/scores/<scorer>/00012-<sha256>.parquet    `key` and the scorer's columns, a row for each accepted sample
    scored/<plan>/<size>/<scorer>/<shards>.json    ScoreSummary, of the shards of an edition, by their numbers

Shards are read and never rewritten: a snapshot joins the tables that it names to their rows. <scorer> is the digest of
the settings that change results and of the weights' bytes, so another head or prompt makes another table. No batch
spans two shards, so a table has the same bytes whichever worker made it, on the same kind of machine with the same
batch size; other batch sizes and devices round differently, in the last digits of a score.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.prepare.plan import Plan, all_shards, read_plan
from data_prep.scores import Sample, Scorer
from data_prep.scores.settings import ClipSettings, EndpointSettings, ScorerSettings
from data_prep.sources.reading import in_order
from infra import layout
from infra.actors import Actors, PoolSettings, fitted
from infra.config import digest
from infra.errors import ClusterError, DataError
from infra.pool import results
from infra.records import ScoreRecord, ScoreSummary, ShardRecord, fetch_data, put_data, read_record, recorded
from infra.shards import parquet_bytes, read_index, read_parquet, shard_key, shard_number
from infra.store import Store

FORMAT = 1  # raised when the same images, settings and weights would give other values
_READERS = 16  # score records, which are small, that are read at once


class ScoreSettings(PoolSettings):
    scorer: ScorerSettings


@dataclass(frozen=True)
class Progress:
    shards: int
    planned_shards: int
    rows: int
    failures: dict[str, int]
    per_second: float  # of the rows that this run scored


class Place(NamedTuple):
    """The side tables of one scorer for the shards of one plan and size, and where the store keeps them."""

    plan: str
    size: str
    scorer: str

    @property
    def prefix(self) -> str:
        return layout.SCORE.under(**self._asdict())

    def key(self, number: int) -> str:
        return layout.SCORE.at(**self._asdict(), number=number)

    def summary_key(self, numbers: list[int]) -> str:
        """The key of the summary of these shards."""
        return layout.SCORED.at(**self._asdict(), shards=digest(numbers))


def scorer_digest(settings: ScoreSettings) -> str:
    """The digest that names a scorer's tables. It hashes local weights, so it reads them in full."""
    return digest({"format": FORMAT, "scorer": settings.scorer.identity()})


def score(
    store: Store,
    plan: str,
    edition: str,
    size: str,
    settings: ScoreSettings,
    progress: Callable[[Progress], None] = lambda so_far: None,
) -> ScoreSummary:
    """Score every shard of an edition of a plan that is not scored yet. Ray must be up (infra.cluster.connect)."""
    planned = read_plan(store, plan, edition)
    numbers = sorted(planned.all_numbers(size))
    place = Place(plan, size, scorer_digest(settings))
    if store.exists(place.summary_key(numbers)):
        return read_record(store, place.summary_key(numbers), ScoreSummary)
    all_shards(store, planned, size)  # an error if one is missing: then none is scored
    scored = _scored(store, place)
    tally = _Tally(len(numbers))
    keys = [place.key(number) for number in numbers if number in scored]
    for record in in_order(partial(read_record, store, kind=ScoreRecord), keys, _READERS):
        tally.add(record, own=False)
    tally.began = time.monotonic()
    todo = [number for number in numbers if number not in scored]
    if todo:
        progress(tally.progress())
        needs = fitted(settings.needs)
        placed = settings.model_copy(update={"scorer": settings.scorer.located(), "gpus": needs.gpus})
        scoring: Actors[int, Done] = Actors("shards", todo, needs, _Worker, store, placed, place)
        for _, done in results(scoring):
            tally.add(done.record, own=done.own)
            progress(tally.progress())
    return recorded(store, place.summary_key(numbers), tally.summary(place, settings.scorer))


def read_scores(store: Store, plan: str, size: str, scorer: str, number: int) -> pa.Table:
    """A shard's side table: `key` and the scorer's columns, a row for each accepted sample in the index's order."""
    record = read_record(store, Place(plan, size, scorer).key(number), ScoreRecord)
    return read_parquet(store, record.table, None)


class Tables(NamedTuple):
    """Tables of scores that a snapshot joins: the digest of their scorer, and the size of the images that it scored."""

    scorer: str
    size: str

    @classmethod
    def named(cls, name: str, size: str) -> Tables:
        """`DIGEST` means tables of the snapshot's own size, `DIGEST@256` those that were made at 256."""
        scorer, _, other = name.partition("@")
        return cls(scorer, other or size)

    def name(self, size: str) -> str:
        """What a snapshot of this size calls them."""
        return self.scorer if self.size == size else f"{self.scorer}@{self.size}"


class SideTables:
    """The side tables of some scorers, named as in `Tables`, for the shards of one plan and size.

    Shards of two sizes that were cut from one planned shard hold the same samples, except those that were refused at
    one of the sizes. So what was scored at another size is found by key; what has no row there has no value.
    """

    def __init__(
        self, store: Store, plan: Plan, size: str, shards: Sequence[ShardRecord], scorers: Sequence[str]
    ) -> None:
        self.store, self.plan, self.size, self.scorers = store, plan, size, scorers
        self._tables = [Tables.named(scorer, size) for scorer in scorers]
        with_samples = {size: {shard.number for shard in shards if shard.tar is not None}}
        for other in {tables.size for tables in self._tables} - {size}:
            with_samples[other] = {shard.number for shard in all_shards(store, plan, other) if shard.tar is not None}
        self._with_samples = with_samples
        for tables in self._tables:
            self._check(tables, with_samples[tables.size])
        first = [self._read(tables, sorted(with_samples[tables.size])[:1]) for tables in self._tables]
        self.schemas = {name: table.schema for name, table in zip(scorers, first, strict=True) if table is not None}

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of all tables, except keys and captions."""
        omitted = ("key", "captions")
        return [field for schema in self.schemas.values() for field in schema if field.name not in omitted]

    def read(self, number: int, keys: pa.ChunkedArray) -> list[pa.Table]:
        """Each scorer's table for a shard's samples: one row for each of the keys, in their order."""
        return [
            self._own(tables, number, keys) if tables.size == self.size else self._other(name, tables, number, keys)
            for name, tables in zip(self.scorers, self._tables, strict=True)
        ]

    def _own(self, tables: Tables, number: int, keys: pa.ChunkedArray) -> pa.Table:
        table = read_scores(self.store, self.plan.digest, self.size, tables.scorer, number)
        if not table["key"].equals(keys):
            raise DataError(
                f"the scores {tables.scorer} of shard {number} are not of the samples that its index holds",
                remedy="delete their record and run `score` again",
            )
        return table

    def _other(self, name: str, tables: Tables, number: int, keys: pa.ChunkedArray) -> pa.Table:
        beside = self.plan.beside(number, self.size, tables.size)
        table = self._read(tables, [number for number in beside if number in self._with_samples[tables.size]])
        table = self.schemas[name].empty_table() if table is None else table
        row = pc.index_in(keys.combine_chunks(), value_set=table["key"].combine_chunks())
        return table.take(row).set_column(table.schema.get_field_index("key"), "key", keys)

    def _read(self, tables: Tables, numbers: Sequence[int]) -> pa.Table | None:
        parts = [read_scores(self.store, self.plan.digest, tables.size, tables.scorer, number) for number in numbers]
        return pa.concat_tables(parts) if parts else None

    def _check(self, tables: Tables, numbers: set[int]) -> None:
        place = Place(self.plan.digest, tables.size, tables.scorer)
        scored = _scored(self.store, place)
        if not scored:
            parent = place.prefix[: -len(tables.scorer) - 1]
            others = sorted({entry.key.removeprefix(parent).partition("/")[0] for entry in self.store.list(parent)})
            raise DataError(
                f"these shards have no scores called `{tables.name(self.size)}`",
                remedy=f"there are {', '.join(others)}" if others else "run `score` first, and name its digest",
            )
        if missing := sorted(numbers - scored):
            raise DataError(
                f"{len(missing)} of {len(numbers)} shards have no scores `{tables.name(self.size)}` "
                f"(the first is {missing[0]})",
                remedy="run that `score` again: it goes on with what is missing",
            )


def _scored(store: Store, place: Place) -> set[int]:
    """The numbers of the shards that are scored, whichever edition of the plan they were scored for."""
    return {shard_number(entry.key) for entry in store.list(place.prefix) if entry.key.endswith(".json")}


# The actors


class Done(NamedTuple):
    record: ScoreRecord
    own: bool  # False if another job had scored the shard meanwhile


class _Worker:
    """An actor with a scorer. Its weights are loaded with the first shard, so that an error reaches the caller."""

    def __init__(self, store: Store, settings: ScoreSettings, place: Place) -> None:
        self.store, self.settings, self.place = store, settings, place
        self.scorer: Scorer | None = None

    def do(self, number: int) -> Done:
        if self.store.exists(self.place.key(number)):
            return Done(read_record(self.store, self.place.key(number), ScoreRecord), own=False)
        if self.scorer is None:
            if scorer_digest(self.settings) != self.place.scorer:
                raise DataError("the scorer's weights differ between machines", remedy="give every node the same files")
            self.scorer = load(self.settings)
        try:
            return Done(score_shard(self.store, self.scorer, self.place, number), own=True)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # by name, since an endpoint's worker does not import torch
                raise
            raise ClusterError(
                f"the GPU has too little memory ({str(error).splitlines()[0]})",
                remedy="lower the scorer's `batch_size`: it changes no table's name, so what is done stays done",
            ) from None


def load(settings: ScoreSettings) -> Scorer:
    """The scorer with its weights, on the worker's device."""
    device, scorer = "cuda" if settings.gpus else "cpu", settings.scorer
    if isinstance(scorer, EndpointSettings):
        from data_prep.scores.endpoint import EndpointScorer

        return EndpointScorer(scorer)
    import torch

    torch.set_num_threads(settings.cpus)
    if isinstance(scorer, ClipSettings):
        from data_prep.scores.clip import ClipScorer

        return ClipScorer(scorer, device, settings.cpus)
    from data_prep.scores.vlm import VlmScorer

    return VlmScorer(scorer, device, settings.cpus)


# One shard


def score_shard(store: Store, scorer: Scorer, place: Place, number: int) -> ScoreRecord:
    """Score one shard: write its table, and last its record. It can be repeated after a crash at any point."""
    shard = read_record(store, shard_key(place.plan, place.size, number), ShardRecord)
    keys: list[str] = []

    def noting_keys() -> Iterator[Sample]:
        for sample in samples(store, shard):
            keys.append(sample.key)
            yield sample

    rows = list(scorer.rows(noting_keys()))
    failure = scorer.fields[-1].name
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), *scorer.fields])
    table = pa.Table.from_pylist([{"key": key} | row for key, row in zip(keys, rows, strict=True)], schema=schema)
    assert table.num_rows == shard.accepted, "a sample was lost or counted twice"
    record = ScoreRecord(
        **place._asdict(),
        number=number,
        table=put_data(store, layout.SCORES.at(scorer=place.scorer), f"{number:05d}.parquet", parquet_bytes(table)),
        rows=table.num_rows,
        failures=dict(sorted(Counter(row[failure] for row in rows if row.get(failure)).items())),
        versions=scorer.versions(),
    )
    return recorded(store, place.key(number), record)


def samples(store: Store, shard: ShardRecord) -> Iterator[Sample]:
    """The shard's accepted samples, in the order of its index; its tar is downloaded once."""
    if shard.tar is None:
        return
    index = read_index(store, shard, ["key", "accepted", "captions", "offset", "length"])
    with TemporaryDirectory(prefix="pixnerd-score-") as folder:
        path = Path(folder, "shard.tar")
        fetch_data(store, shard.tar, path)
        file = path.open("rb")
    with file:  # it is deleted already, so that a worker which is killed leaves nothing on the disk
        for batch in index.filter(index["accepted"]).to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                file.seek(row["offset"])
                yield Sample(row["key"], row["captions"], file.read(row["length"]))


@dataclass
class _Tally:
    planned: int
    shards: int = 0
    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = 0.0  # when this run began to score, by time.monotonic()
    own_rows: int = 0  # that it has scored since

    def add(self, record: ScoreRecord, *, own: bool) -> None:
        """Count a shard; `own` if this run scored it."""
        self.shards += 1
        self.rows += record.rows
        self.own_rows += record.rows if own else 0
        self.failures.update(record.failures)
        self.versions[repr(sorted(record.versions.items()))] = record.versions

    def progress(self) -> Progress:
        passed = max(time.monotonic() - self.began, 1e-9)
        return Progress(self.shards, self.planned, self.rows, dict(self.failures), self.own_rows / passed)

    def summary(self, place: Place, scorer: ScorerSettings) -> ScoreSummary:
        assert self.shards == self.planned, "a shard was lost or counted twice"
        return ScoreSummary(
            **place._asdict(),
            settings=scorer.identity(),
            columns=scorer.columns(),
            shards=self.shards,
            rows=self.rows,
            failures=dict(sorted(self.failures.items())),
            versions=[self.versions[name] for name in sorted(self.versions)],
        )

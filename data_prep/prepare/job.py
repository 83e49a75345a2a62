"""`prepare`: sources -> shards in the store, as Ray tasks.

    plan  ->  downloads, where a source is a list of URLs  ->  shards  ->  one summary

Each planned shard is a task, and so is each batch of URLs (`originals`) that is not there yet: a shard begins when all
batches that it needs are there. What a job may ask of the web is dealt out among those of its downloads that are under
way. Another job knows nothing of that: two at once may ask for twice as much.

A record in the store means that its shard is done. So a run that was killed is finished by running it again, a second
run of finished work does nothing, and any number of runs at once agree. A file that kills its decoder is found and
rejected; the shard, and the job, go on without it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.prepare import catalogue, downloads, links, originals
from data_prep.prepare.downloads import Downloads
from data_prep.prepare.downloads import Work as Downloading
from data_prep.prepare.linked import Linked
from data_prep.prepare.links import At
from data_prep.prepare.plan import Plan, PlannedShard, PrepareSettings, make_plan
from data_prep.prepare.retries import Retry, begin, retries, retry
from data_prep.rejections import counted, remedy
from data_prep.sources import UrlSource
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.errors import DataError
from infra.pool import Work, results
from infra.records import PrepareSummary, ShardRecord, SizeSummary, read_record, write_record
from infra.shards import shard_key, shard_prefix
from infra.store import Store, open_store

if TYPE_CHECKING:
    from data_prep.prepare.shard import Decoder

_log = logging.getLogger(__name__)

WORKER_LIFE = 200  # shards: native libraries leak a little, a new process does not


def check_accepted(summary: PrepareSummary) -> None:
    """Raises where nothing is left for anybody to use; tells of a size of which that is true."""
    without = {size: counts.rejected for size, counts in summary.sizes.items() if not counts.accepted}
    for size, rejected in without.items():
        if not rejected:
            raise DataError("the sources hold no images", remedy="check each source's `url`, and what lies there")
        if len(without) == len(summary.sizes):
            raise DataError(
                f"no image was accepted: {counted(rejected)}",
                remedy=f"{remedy(rejected)}; `pixnerd data show` tells more",
            )
        _log.warning("no image was accepted at size %s: %s: %s", size, counted(rejected), remedy(rejected))


@dataclass(frozen=True)
class Progress:
    shards: int
    planned_shards: int
    inputs: int  # whose fate is known: not those whose download is about to be tried again
    planned_inputs: int  # nobody has counted a tar's before it is read: an estimate of those that are to come
    downloads: int  # URLs that have been tried
    planned_downloads: int
    accepted: dict[str, int]  # size -> count
    rejected: dict[str, dict[str, int]]  # size -> cause -> count
    own_inputs: int  # of those in `inputs`, the ones that this run worked on; another may be at work beside it
    per_second: float  # of those


def prepare(
    store: Store | str,
    settings: PrepareSettings,
    progress: Callable[[Progress], None] | None = None,
    decoder: Decoder | None = None,
) -> PrepareSummary:
    """Make every shard that is not there yet. Ray must be up (infra.cluster.connect)."""
    store = open_store(store) if isinstance(store, str) else store
    plan = make_plan(store, settings)
    key = summary_key(plan.digest, plan.edition)
    if store.exists(key):
        return read_record(store, key, PrepareSummary)
    tally = _Tally(plan, _tried_again(store, settings, plan))
    for shard, records in _done(store, plan):
        tally.add(shard, Made(records, own=False))
    todo = [shard for shard in plan.shards if shard.number not in tally.done]
    job = _Job(store, settings, plan, decoder, todo)
    tally.begin(sum(work.batch.urls for work in job.downloads.works))
    if job.left:
        if progress:
            progress(tally.progress())
        for what, made in results(job):
            if isinstance(what, PlannedShard):
                tally.add(what, made)
            else:
                tally.downloads += what.batch.urls
            if progress:
                progress(tally.progress())
    if job.downloads.works:
        catalogue.update(store)
    if not settings.keep_originals:  # before the summary: who finds that has nothing left to do
        downloads.drop(store, settings, plan)
    write_record(store, key, tally.summary())
    return read_record(store, key, PrepareSummary)


def retry_failed(store: Store, settings: PrepareSettings) -> int:
    """Let the next `prepare` download again what failed for causes that can pass; how many inputs that are."""
    return begin_retries(store, failed_downloads(store, settings))


def failed_downloads(store: Store, settings: PrepareSettings) -> list[Retry]:
    """What could be tried again, list by list. It is refused where downloads are not finished; nothing is written."""
    states, found, lists = originals.states(store), dict[str, Retry | None](), 0
    for source in settings.sources:
        if not isinstance(source, UrlSource):
            continue
        for given in source.inputs(store):
            place = links.place(source, given.name, given.sha256, settings.fetch)
            found[place] = found.get(place) or retry(store, given.name, place, states)
            lists += links.read_links(store, At(place)) is not None
    if found and not lists:
        raise DataError("none of the downloads has been begun", remedy="prepare without a retry first")
    return [each for each in found.values() if each is not None]


def begin_retries(store: Store, found: Sequence[Retry]) -> int:
    return sum(begin(store, each) for each in found)


def summary_key(plan: str, edition: str) -> str:
    return layout.PREPARED.at(plan=plan, edition=edition)


def _tried_again(store: Store, settings: PrepareSettings, plan: Plan) -> Counter[str]:
    """Why the downloads failed that a later generation of this plan has tried again."""
    again: Counter[str] = Counter()
    for given in plan.inputs:
        if given.generation:
            again.update(retries(store, settings.at(given).place)[given.generation - 1].causes)
    return again


def _done(store: Store, plan: Plan) -> Iterator[tuple[PlannedShard, list[ShardRecord]]]:
    """The planned shards all of whose records are there."""
    found: dict[int, list[ShardRecord]] = {}
    for size, each in plan.sizes.items():
        for record in plan.records(store, size):
            found.setdefault(record.number // each, []).append(record)
    for shard in plan.shards:
        records = found.get(shard.number, [])
        if len(records) == sum(plan.sizes.values()):
            yield shard, records


class Made(NamedTuple):
    """What a planned shard became."""

    records: list[ShardRecord]
    own: bool  # False if another run had made it before this one came to it


Piece = Downloading | PlannedShard


class _Job(Work[Piece, Made]):
    """What is left to do. Downloads and shards are under way at the same time; a shard waits for its own downloads.

    Ray by itself starts once more whatever dies with its worker; here one hears of the second death. A shard is then
    made with its decoder guarded.
    """

    noun = "shards"

    def __init__(
        self, store: Store, settings: PrepareSettings, plan: Plan, decoder: Decoder | None, todo: list[PlannedShard]
    ) -> None:
        self.downloads = Downloads(store, settings, plan, todo)
        super().__init__(self.downloads.ready, settings.in_flight)
        self.left = len(todo)
        self._store, self._settings, self._plan, self._decoder = store, settings, plan, decoder
        self._works = deque(self.downloads.works)
        self._taken: dict[str, FetchSettings] = {}  # by batches

    def begin(self) -> None:
        import ray

        super().begin()
        # Dealt out once: downloads that are under way would know nothing of another share.
        self._shares = _shares(self._settings.fetch, min(self.at_once, len(self._works)))
        # One of each for the whole job: Ray counts a worker's calls by what `remote` returned.
        limits = {"max_calls": WORKER_LIFE, "max_retries": 1}
        # Downloading waits for the web most of the time: it keeps no CPU from those that decode, and no node to itself.
        self._download = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", **limits)(_download)
        self._make = ray.remote(num_cpus=1, **limits)(_make)

    def ready(self, running: Collection[Piece]) -> Iterator[Piece]:
        """A download for each free share, and no more shards than Ray can soon begin."""
        while self._works and self._shares:
            yield self._works.popleft()
        yield from super().ready([piece for piece in running if isinstance(piece, PlannedShard)])

    def start(self, piece: Piece, again: bool) -> Any:
        if isinstance(piece, Downloading):
            share = self._taken[piece.batch.name] = self._shares.pop()
            return self._download.remote(self._store, share, piece, self._settings.keep_originals)
        linked = self.downloads.linked(piece)
        return self._make.remote(
            self._store, self._settings, self._plan.without_shards(), piece, linked, self._decoder, again
        )

    def ended(self, piece: Piece, result: Made | None) -> None:
        if isinstance(piece, PlannedShard):
            super().ended(piece, result)
            return
        self._shares.append(self._taken.pop(piece.batch.name))
        if result is not None:
            self.waiting.extend(self.downloads.finished(piece))

    def name(self, piece: Piece) -> str:
        if isinstance(piece, Downloading):
            return str(piece)
        return f"shard {piece.number} ({piece.source}, {piece.part.input})"


def _shares(settings: FetchSettings, tasks: int) -> list[FetchSettings]:
    """What each of so many tasks may do that download at once: all together just what the limits allow.

    Where there is not enough for so many, there are fewer.
    """
    limits = {"at_once": settings.at_once, "per_host": settings.per_host, "ahead_mib": settings.ahead_mib}
    tasks = min(tasks, *limits.values())
    # Each limit is the sum of (limit + n) // tasks over n = 0 .. tasks - 1.
    return [
        settings.model_copy(update={name: (limit + number) // tasks for name, limit in limits.items()})
        for number in range(tasks)
    ]


def _download(store: Store, settings: FetchSettings, work: Downloading, keep: bool) -> Made:
    downloads.download(store, settings, work, keep=keep)
    return Made([], own=True)  # no shard yet


def _make(
    store: Store,
    settings: PrepareSettings,
    plan: Plan,
    shard: PlannedShard,
    linked: Linked | None,
    decoder: Decoder | None,
    guarded: bool,
) -> Made:
    """What a Ray worker does. torch is imported here, in the worker, not by whoever plans."""
    keys = [shard_key(plan.digest, size, number) for size in plan.sizes for number in plan.numbers(shard, size)]

    def made() -> Made | None:
        """By another run."""
        there = all(store.exists(key) for key in keys)
        return Made([read_record(store, key, ShardRecord) for key in keys], own=False) if there else None

    if found := made():
        return found
    import torch

    from data_prep.images.decode import decode
    from data_prep.prepare import quarantine
    from data_prep.prepare.shard import make_shard, plain_outcomes

    torch.set_num_threads(1)  # a task is one CPU
    outcomes = partial(quarantine.outcomes if guarded else plain_outcomes, settings=settings, decoder=decoder or decode)
    try:
        return Made(make_shard(store, settings, plan, shard, linked, outcomes), own=True)
    except originals.Gone:
        if found := made():  # and it has dropped since what it was made of
            return found
        raise


@dataclass
class _Tally:
    plan: Plan
    tried_again: Counter[str]
    done: set[int] = field(default_factory=set)
    inputs: int = 0
    downloads: int = 0
    planned_downloads: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = 0.0
    own_inputs: int = 0
    expected: int = 0  # inputs of the shards that are done, as they were planned

    def begin(self, downloads: int) -> None:
        """From here on it is this run's speed."""
        self.planned_downloads = downloads
        self.began = time.monotonic()

    def add(self, shard: PlannedShard, made: Made) -> None:
        records = made.records
        counts = {size: sum(r.inputs for r in records if r.size == size) for size in self.plan.sizes}
        assert len(set(counts.values())) == 1, "the sizes of a shard have different inputs"
        inputs = next(iter(counts.values()))
        assert inputs == shard.expected or not shard.counted, "an input was lost or counted twice"
        self.done.add(shard.number)
        self.expected += shard.expected
        self.inputs += inputs
        self.own_inputs += inputs if made.own else 0
        for record in records:
            self.accepted[record.size] += record.accepted
            self.rejected.setdefault(record.size, Counter()).update(record.rejected)
            self.versions[repr(sorted(record.versions.items()))] = record.versions

    def progress(self) -> Progress:
        seconds = max(time.monotonic() - self.began, 1e-9)
        again = self.tried_again.total()  # each counts with what comes of it last, and until then not at all
        inputs = max(0, self.inputs - again)
        return Progress(
            shards=len(self.done),
            planned_shards=len(self.plan.shards),
            inputs=inputs,
            planned_inputs=self.inputs + self.plan.rows - self.expected - again,
            downloads=self.downloads,
            planned_downloads=self.planned_downloads,
            accepted=dict(self.accepted),
            rejected={size: dict(causes - self.tried_again) for size, causes in self.rejected.items()},
            own_inputs=min(self.own_inputs, inputs),
            per_second=self.own_inputs / seconds,
        )

    def summary(self) -> PrepareSummary:
        again = self.tried_again.total()
        sizes = {}
        for size, each in self.plan.sizes.items():
            rejected = self.rejected[size]
            rejected.subtract(self.tried_again)
            sizes[size] = SizeSummary(
                shards=shard_prefix(self.plan.digest, size),
                count=each * len(self.done),
                accepted=self.accepted[size],
                rejected={cause: count for cause, count in sorted(rejected.items()) if count},
            )
            assert sizes[size].accepted + sum(sizes[size].rejected.values()) == self.inputs - again
        return PrepareSummary(
            plan=self.plan.digest,
            edition=self.plan.edition,
            inputs=self.inputs - again,
            tried_again=dict(sorted(self.tried_again.items())),
            sizes=sizes,
            versions=[self.versions[name] for name in sorted(self.versions)],
        )

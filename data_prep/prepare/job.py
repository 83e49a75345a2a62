"""`prepare`: sources -> shards in the store, as Ray tasks.

    plan  ->  downloads, where a source is a list of URLs  ->  shards  ->  one summary

Each planned shard is a task, and so is each batch of URLs (`originals`) that must be downloaded. A shard starts when
all batches that it needs are in the store. The simultaneous downloads of a job divide the limits of its requests among
them. Jobs do not know of each other: two at once may make twice as many requests.

A record in the store means that its shard is done. So running it again finishes a run that was killed and does nothing
after one that was not, and any number of simultaneous runs agree. A file that kills its decoder is found and rejected,
and the shard and the job go on without it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from infra.records import PrepareSummary, ShardRecord, SizeSummary, read_record, recorded
from infra.shards import shard_key, shard_prefix
from infra.store import Store

if TYPE_CHECKING:
    from data_prep.prepare.shard import Decoder

_log = logging.getLogger(__name__)

WORKER_LIFE = 200  # shards, after which a worker process is replaced: native libraries leak a little memory


def check_accepted(summary: PrepareSummary) -> None:
    """Raise if no image was accepted at any size; warn of a size at which none was."""
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
    inputs: int  # accepted or rejected, without those whose download will be tried again
    planned_inputs: int  # an estimate, as the members of a tar are not counted before it is read
    downloads: int  # URLs that were tried
    planned_downloads: int
    accepted: dict[str, int]  # size -> count
    rejected: dict[str, dict[str, int]]  # size -> cause -> count
    own_inputs: int  # those of `inputs` that this run worked on, and not one before or beside it
    per_second: float  # own inputs


def prepare(
    store: Store,
    settings: PrepareSettings,
    progress: Callable[[Progress], None] = lambda so_far: None,
    decoder: Decoder | None = None,
    check_held: Callable[[], None] = lambda: None,
) -> PrepareSummary:
    """Make every shard that is not in the store. Ray must be up (infra.cluster.connect).

    `check_held` raises if the work is another driver's by now, which may need the originals still.
    """
    plan = make_plan(store, settings)
    key = layout.PREPARED.at(plan=plan.digest, edition=plan.edition)
    if store.exists(key):
        return read_record(store, key, PrepareSummary)
    tally = _Tally(plan, _tried_again(store, settings, plan))
    for shard, records in _done(store, plan):
        tally.add(shard, Made(records, own=False))
    todo = [shard for shard in plan.shards if shard.number not in tally.done]
    job = _Job(store, settings, plan, decoder, todo)
    tally.begin(sum(work.batch.urls for work in job.downloads.works))
    if job.left:
        progress(tally.progress())
        for piece, made in results(job):
            if isinstance(piece, PlannedShard):
                tally.add(piece, made)
            else:
                tally.downloads += piece.batch.urls
            progress(tally.progress())
    if job.downloads.works:
        catalogue.update(store)
    if not settings.keep_originals:  # before the summary, as a run that finds one does nothing
        check_held()
        downloads.drop(store, settings, plan)
    return recorded(store, key, tally.summary())


def failed_downloads(store: Store, settings: PrepareSettings) -> list[Retry]:
    """What can be tried again of each list; an error if downloads are not finished. Nothing is written."""
    states, by_place, begun = originals.states(store), dict[str, Retry | None](), False
    for source in settings.sources:
        if not isinstance(source, UrlSource):
            continue
        for table in source.inputs(store):
            place = links.place(source, table.name, table.sha256, settings.fetch)
            by_place[place] = by_place.get(place) or retry(store, table.name, place, states)
            begun |= links.read_links(store, At(place)) is not None
    if by_place and not begun:
        raise DataError("none of the downloads has been begun", remedy="prepare without a retry first")
    return [failed for failed in by_place.values() if failed is not None]


def begin_retries(store: Store, failed: Sequence[Retry]) -> int:
    """Let the next `prepare` try these downloads again; return how many."""
    return sum(begin(store, of_list) for of_list in failed)


def _tried_again(store: Store, settings: PrepareSettings, plan: Plan) -> Counter[str]:
    """Cause -> how many downloads failed for it that a later generation of this plan tries again."""
    causes: Counter[str] = Counter()
    for known in plan.inputs:
        if known.generation:
            causes.update(retries(store, settings.at(known).place)[known.generation - 1].causes)
    return causes


def _done(store: Store, plan: Plan) -> Iterator[tuple[PlannedShard, list[ShardRecord]]]:
    """The planned shards all of whose records are in the store."""
    by_shard: dict[int, list[ShardRecord]] = {}
    for size, count in plan.sizes.items():
        for record in plan.records(store, size):
            by_shard.setdefault(record.number // count, []).append(record)
    for shard in plan.shards:
        records = by_shard.get(shard.number, [])
        if len(records) == sum(plan.sizes.values()):
            yield shard, records


class Made(NamedTuple):
    """What a planned shard became."""

    records: list[ShardRecord]
    own: bool  # False if another run had made it already


Piece = Downloading | PlannedShard


class _Job(Work[Piece, Made]):
    """The downloads and shards that are left to do, in one loop; a shard waits only for the downloads that it needs.

    If a task's worker dies, Ray itself repeats the task once. Only a second death is reported here, and the shard is
    then made with its decoder in a child process (`quarantine`).
    """

    noun = "shards"

    def __init__(
        self, store: Store, settings: PrepareSettings, plan: Plan, decoder: Decoder | None, todo: list[PlannedShard]
    ) -> None:
        self.downloads = Downloads(store, settings, plan, todo)
        super().__init__(self.downloads.ready, settings.in_flight)
        self.left = len(todo)
        self._store, self._settings, self._decoder = store, settings, decoder
        self._plan = replace(plan, shards=[])  # a task needs no copy of perhaps 36,000 planned shards
        self._works = deque(self.downloads.works)
        self._taken: dict[str, FetchSettings] = {}  # the shares of running downloads, by batch

    def begin(self) -> None:
        import ray

        super().begin()
        # Divided once, as a running download would not hear of a new share.
        self._shares = _shares(self._settings.fetch, min(self.at_once, len(self._works)))
        # Made once for the whole job: Ray counts a worker's calls (`max_calls`) per remote function.
        limits = {"max_calls": WORKER_LIFE, "max_retries": 1}
        # A download mostly waits for the web, so it takes no CPU from decoding; and they spread over the nodes.
        self._download = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", **limits)(_download)
        self._make = ray.remote(num_cpus=1, **limits)(_make)

    def ready(self, running: Collection[Piece]) -> Iterator[Piece]:
        """A download for each free share, and as many shards as `at_once` allows."""
        while self._works and self._shares:
            yield self._works.popleft()
        yield from super().ready([piece for piece in running if isinstance(piece, PlannedShard)])

    def start(self, piece: Piece, again: bool) -> Any:
        if isinstance(piece, Downloading):
            share = self._taken[piece.batch.name] = self._shares.pop()
            return self._download.remote(self._store, share, piece, self._settings.keep_originals)
        linked = self.downloads.linked(piece)
        return self._make.remote(self._store, self._settings, self._plan, piece, linked, self._decoder, again)

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
    """Fetch settings for `tasks` simultaneous downloads, whose limits add up to those of `settings`.

    A limit cannot be less than one, so there are fewer of them where a limit is smaller than `tasks`.
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
    """Make the shards of a planned shard: a Ray task. torch is imported here, so that the driver needs none."""
    keys = [shard_key(plan.digest, size, number) for size in plan.sizes for number in plan.numbers(shard, size)]

    def made_by_another_run() -> Made | None:
        if not all(store.exists(key) for key in keys):
            return None
        return Made([read_record(store, key, ShardRecord) for key in keys], own=False)

    if made := made_by_another_run():
        return made
    import torch

    from data_prep.images.decode import decode
    from data_prep.prepare import quarantine
    from data_prep.prepare.shard import make_shard, plain_outcomes

    torch.set_num_threads(1)  # a task is one CPU
    outcomes = partial(quarantine.outcomes if guarded else plain_outcomes, settings=settings, decoder=decoder or decode)
    try:
        return Made(make_shard(store, settings, plan, shard, linked, outcomes), own=True)
    except originals.Gone:
        if made := made_by_another_run():  # which has dropped the originals since
            return made
        raise


@dataclass
class _Tally:
    """The counts of a run, from which its progress and its summary are told."""

    plan: Plan
    tried_again: Counter[str]  # cause -> failed downloads that a later generation tries again
    done: set[int] = field(default_factory=set)
    inputs: int = 0
    downloads: int = 0
    planned_downloads: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = 0.0
    own_inputs: int = 0
    expected: int = 0  # planned inputs of the shards that are done

    def begin(self, downloads: int) -> None:
        """Start to measure the speed of this run."""
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
        again = self.tried_again.total()  # such an input counts once, with the result of its last try
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
        for size, count in self.plan.sizes.items():
            rejected = self.rejected[size]
            rejected.subtract(self.tried_again)
            sizes[size] = SizeSummary(
                shards=shard_prefix(self.plan.digest, size),
                count=count * len(self.done),
                accepted=self.accepted[size],
                rejected={cause: inputs for cause, inputs in sorted(rejected.items()) if inputs},
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

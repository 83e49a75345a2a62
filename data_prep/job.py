"""`prepare`: sources -> shards in the store, as Ray tasks.

    plan  ->  downloads, where a source is a list of URLs  ->  shards  ->  one summary

Each planned shard is a task, and so is each download of 1,024 rows (`originals.ROWS`) of a list: a shard begins when
all downloads that it needs are there. What a job may ask of the web is dealt out among those of its downloads that are
under way. Another job knows nothing of that: two at once may ask for twice as much.

A record in the store means that its shard is done. So a run that was killed is finished by running it again, a second
run of finished work does nothing, and any number of runs at once agree. A file that kills its decoder is found and
rejected; the shard, and the job, go on without it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from data_prep import originals
from data_prep.fetch import FetchSettings
from data_prep.originals import Work
from data_prep.plan import KnownAs, Plan, PlannedShard, PrepareSettings, make_plan
from data_prep.rejections import counted, remedy
from data_prep.sources import Range, UrlList, inputs, ranges
from infra.cluster import sigterm
from infra.errors import ClusterError, DataError, Stopped
from infra.records import Record, ShardRecord, read_record, write_record
from infra.shards import shard_key, shard_prefix
from infra.store import Store, open_store

if TYPE_CHECKING:
    from data_prep.make import Decoder

_log = logging.getLogger(__name__)

WORKER_LIFE = 200  # shards: native libraries leak a little, a new process does not


class SizeSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    shards: str  # key prefix of the records
    count: int
    accepted: int
    rejected: dict[str, int]  # an input whose download was tried again counts with what came of it last


class PrepareSummary(Record):
    """What became of every input, at every size; the same whoever did the work."""

    plan: str
    edition: str
    inputs: int
    tried_again: dict[str, int]  # why downloads had failed that were tried again -> count
    sizes: dict[str, SizeSummary]
    versions: list[dict[str, str]]  # more than one if the decoders changed between runs


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
    inputs: int
    planned_inputs: int  # nobody has counted a tar's before it is read: an estimate of those that are to come
    downloads: int  # inputs whose download has been tried
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
    job = _Job(store, settings, plan, decoder, [shard for shard in plan.shards if shard.number not in tally.done])
    tally.begin(sum(task.what.part.rows for task in job.downloads))
    if job.missing:
        if progress:
            progress(tally.progress())
        for what, made in job.run():
            if isinstance(what, PlannedShard):
                tally.add(what, made)
            else:
                tally.downloads += what.part.rows
            if progress:
                progress(tally.progress())
    if not settings.keep_originals:  # before the summary: who finds that has nothing left to do
        originals.drop(store, [work for works in job.originals.values() for work in works])
    write_record(store, key, tally.summary())
    return read_record(store, key, PrepareSummary)


def retry_failed(store: Store, settings: PrepareSettings) -> int:
    """Let the next `prepare` download again what failed for causes that can pass; how many inputs that are."""
    count = 0
    for source in settings.sources:
        if not isinstance(source, UrlList):
            continue
        for found in inputs(source, store):
            parts = list(ranges(source, store, found, settings.rows))
            if parts:
                whole = parts[0]._replace(rows=sum(part.rows for part in parts))
                count += originals.retry(store, source, found, whole, settings.fetch)
    return count


def summary_key(plan: str, edition: str) -> str:
    return f"{summary_prefix(plan)}{edition}.json"


def summary_prefix(plan: str) -> str:
    return f"prepared/{plan}/"


def _tried_again(store: Store, settings: PrepareSettings, plan: Plan) -> Counter[str]:
    """Why the downloads failed that a later generation of this plan has tried again."""
    again: Counter[str] = Counter()
    for given in plan.inputs:
        if given.generation:
            again.update(originals.retries(store, settings.place(given))[given.generation - 1].causes)
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


@dataclass(frozen=True)
class _Task:
    """Something that Ray works on. What kills its worker is tried again: a shard then with its decoder guarded.

    Ray by itself starts once more whatever dies with its worker; here one hears of the second death.
    """

    what: Work | PlannedShard
    again: bool = False
    share: FetchSettings | None = None  # of a download that is under way: what it may do


class _Job:
    """What is left to do. Downloads and shards are under way at the same time; a shard waits for its own downloads."""

    def __init__(
        self, store: Store, settings: PrepareSettings, plan: Plan, decoder: Decoder | None, todo: list[PlannedShard]
    ) -> None:
        self.store, self.settings, self.plan, self.decoder = store, settings, plan, decoder
        self.sources = settings.by_name
        self.originals = _originals(settings, plan)
        there = _downloaded(store, self.originals)
        if not settings.keep_originals:  # a shard that is made again needs once more what was dropped when all was done
            there -= originals.without_tar(store, there & {work for shard in todo for work in self._needs(shard)})
        self.missing = {shard: {work for work in self._needs(shard) if work not in there} for shard in todo}
        self.needed_by: dict[Work, list[PlannedShard]] = {}
        for shard, works in self.missing.items():
            for work in works:
                self.needed_by.setdefault(work, []).append(shard)
        self.downloads = deque(_Task(work) for work in sorted(self.needed_by, key=lambda work: work.key))
        self.shards = deque(_Task(shard) for shard, works in self.missing.items() if not works)

    def run(self) -> Iterator[tuple[Work | PlannedShard, Made]]:
        """What has been made, as it gets done, in no particular order."""
        import ray

        # One of each for the whole job: Ray counts a worker's calls by what `remote` returned.
        limits = {"max_calls": WORKER_LIFE, "max_retries": 1}
        # Downloading waits for the web most of the time: it keeps no CPU from those that decode, and no node to itself.
        remotes = {
            Work: ray.remote(num_cpus=0, scheduling_strategy="SPREAD", **limits)(_download),
            PlannedShard: ray.remote(num_cpus=1, **limits)(_make),
        }
        # Dealt out once: downloads that are under way would know nothing of another share.
        shares = _shares(self.settings.fetch, min(self._at_once(), len(self.downloads)))
        left = len(self.missing)
        running: dict[Any, _Task] = {}
        with sigterm() as stopped:
            try:
                while self.downloads or self.shards or running:
                    for task in self._next(running, shares):
                        running[remotes[type(task.what)].remote(*self._orders(task))] = task
                    ready, _ = ray.wait(list(running), timeout=0.5)
                    if stopped.is_set():
                        raise Stopped(
                            f"stopped by SIGTERM with {left} shards left",
                            remedy="run the same command again; it goes on from there",
                        )
                    for ref in ready:
                        task = running.pop(ref)
                        if task.share:
                            shares.append(task.share)
                        made = _result(ref, task)
                        if made is None:
                            self._queue(task.what).appendleft(_Task(task.what, again=True))
                        else:
                            self._settle(task.what)
                            left -= isinstance(task.what, PlannedShard)
                            yield task.what, made
            finally:
                for ref in running:
                    ray.cancel(ref)
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=10)

    def _next(self, running: dict[Any, _Task], shares: list[FetchSettings]) -> Iterator[_Task]:
        """The tasks to start now: a download for each free share, and no more shards than Ray can soon begin."""
        while self.downloads and shares:
            yield replace(self.downloads.popleft(), share=shares.pop())
        free = self._at_once() - sum(isinstance(task.what, PlannedShard) for task in running.values())
        for _ in range(min(free, len(self.shards))):
            yield self.shards.popleft()

    def _at_once(self) -> int:
        import ray

        return self.settings.in_flight or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))

    def _orders(self, task: _Task) -> tuple[Any, ...]:
        what = task.what
        if isinstance(what, Work):
            return self.store, self.sources[what.source], task.share, what
        return self.store, self.settings, self.plan.without_shards(), what, self._needs(what), self.decoder, task.again

    def _queue(self, what: Work | PlannedShard) -> deque[_Task]:
        return self.downloads if isinstance(what, Work) else self.shards

    def _needs(self, shard: PlannedShard) -> list[Work]:
        works = self.originals.get(shard.known_as, [])
        part = shard.part
        return works[part.first // originals.ROWS : -(-(part.first + part.rows) // originals.ROWS)]

    def _settle(self, what: Work | PlannedShard) -> None:
        if isinstance(what, Work):
            for shard in self.needed_by.pop(what):
                self.missing[shard].discard(what)
                if not self.missing[shard]:
                    self.shards.append(_Task(shard))


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


def _originals(settings: PrepareSettings, plan: Plan) -> dict[KnownAs, list[Work]]:
    """All downloads of the plan's inputs."""
    sources = settings.by_name
    whole: dict[KnownAs, Range] = {}
    for shard in plan.shards:
        if isinstance(sources[shard.source], UrlList):
            whole[shard.known_as] = shard.part._replace(first=0, rows=shard.part.first + shard.part.rows)
    found = {}
    for known_as, part in whole.items():
        source = sources[known_as.source]
        assert isinstance(source, UrlList)
        found[known_as] = originals.works(source, settings.place(known_as), known_as.generation, part)
    return found


def _downloaded(store: Store, works: dict[KnownAs, list[Work]]) -> set[Work]:
    there = {entry.key for here in works.values() if here for entry in store.list(here[0].folder)}
    return {work for here in works.values() for work in here if work.key in there}


def _result(ref: Any, task: _Task) -> Made | None:
    """None if the task's process died, so that it must be tried once more, with care."""
    import ray
    from ray import exceptions

    try:
        made: Made = ray.get(ref)
    except exceptions.RayTaskError as error:
        raise error.cause from None
    except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError) as error:
        if task.again:
            raise ClusterError(
                f"{_name(task.what)} kills its worker, and did so before ({error})",
                remedy="look for the out-of-memory killer in the node's log; give the cluster more memory per CPU",
            ) from None
        return None
    return made


def _name(what: Work | PlannedShard) -> str:
    kind = "the originals" if isinstance(what, Work) else "shard"
    return f"{kind} {what.number} ({what.source}, {what.part.input})"


def _download(store: Store, source: UrlList, settings: FetchSettings, work: Work) -> Made:
    originals.make(store, source, settings, work)
    return Made([], own=True)  # no shard yet


def _make(
    store: Store,
    settings: PrepareSettings,
    plan: Plan,
    shard: PlannedShard,
    works: list[Work],
    decoder: Decoder | None,
    guarded: bool,
) -> Made:
    """What a Ray worker does. torch is imported here, in the worker, not by whoever plans."""
    keys = [shard_key(plan.digest, size, number) for size in plan.sizes for number in plan.numbers(shard, size)]
    if all(store.exists(key) for key in keys):
        return Made([read_record(store, key, ShardRecord) for key in keys], own=False)
    import torch

    from data_prep import make, quarantine
    from data_prep.decode import decode

    torch.set_num_threads(1)  # a task is one CPU
    outcomes = partial(
        quarantine.outcomes if guarded else make.plain_outcomes, settings=settings, decoder=decoder or decode
    )
    return Made(make.make_shard(store, settings, plan, shard, works, outcomes), own=True)


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
        return Progress(
            shards=len(self.done),
            planned_shards=len(self.plan.shards),
            inputs=self.inputs,
            planned_inputs=self.inputs + self.plan.rows - self.expected,
            downloads=self.downloads,
            planned_downloads=self.planned_downloads,
            accepted=dict(self.accepted),
            rejected={size: dict(causes) for size, causes in self.rejected.items()},
            own_inputs=self.own_inputs,
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

"""`prepare`: sources -> shards in the store, as Ray tasks, one for each planned shard.

A record in the store means that its shard is done. So a run that was killed is finished by running it again, a second
run of finished work does nothing, and any number of runs at once agree. A file that kills its decoder is found and
rejected; the shard, and the job, go on without it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from data_prep.plan import Plan, PlannedShard, PrepareSettings, make_plan
from infra.errors import ClusterError, PixnerdError
from infra.records import Record, ShardRecord, read_record, write_record
from infra.shards import list_shards, shard_prefix
from infra.store import Store, open_store

if TYPE_CHECKING:
    from data_prep.make import Decoder

WORKER_LIFE = 200  # shards: native libraries leak a little, a new process does not


class SizeSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    shards: str  # key prefix of the records
    count: int
    accepted: int
    rejected: dict[str, int]


class PrepareSummary(Record):
    """What became of every input, at every size; the same whoever did the work."""

    plan: str
    inputs: int
    sizes: dict[str, SizeSummary]
    versions: list[dict[str, str]]  # more than one if the decoders changed between runs


@dataclass(frozen=True)
class Progress:
    shards: int
    planned_shards: int
    inputs: int
    planned_inputs: int
    accepted: dict[str, int]  # size -> count
    rejected: dict[str, dict[str, int]]  # size -> cause -> count
    per_second: float  # inputs, in this run
    seconds_left: float | None


def prepare(
    store: Store | str,
    settings: PrepareSettings,
    progress: Callable[[Progress], None] | None = None,
    decoder: Decoder | None = None,
) -> PrepareSummary:
    """Make every shard that is not there yet. Ray must be up (infra.cluster.connect)."""
    store = open_store(store) if isinstance(store, str) else store
    plan = make_plan(store, settings)
    if store.exists(summary_key(plan.digest)):
        return read_record(store, summary_key(plan.digest), PrepareSummary)
    tally = _Tally(plan, [str(size) for size in settings.sizes])
    for records in _done(store, plan.digest, tally.sizes).values():
        tally.add(records)
    tally.begin()
    todo = [shard for shard in plan.shards if shard.number not in tally.done]
    if todo:
        if progress:
            progress(tally.progress())
        for records in _run(store, settings, plan.digest, todo, decoder):
            tally.add(records)
            if progress:
                progress(tally.progress())
    summary = tally.summary()
    write_record(store, summary_key(plan.digest), summary)
    return summary


def summary_key(plan: str) -> str:
    return f"prepared/{plan}.json"


def _done(store: Store, plan: str, sizes: list[str]) -> dict[int, list[ShardRecord]]:
    """The shards that have a record at every size."""
    found: dict[int, list[ShardRecord]] = {}
    for size in sizes:
        for record in list_shards(store, shard_prefix(plan, size)):
            found.setdefault(record.number, []).append(record)
    return {number: records for number, records in sorted(found.items()) if len(records) == len(sizes)}


def _run(
    store: Store, settings: PrepareSettings, plan: str, todo: list[PlannedShard], decoder: Decoder | None
) -> Iterator[list[ShardRecord]]:
    """The records of each shard as it gets done, in no particular order; never more than `in_flight` tasks at once."""
    import ray

    task = ray.remote(num_cpus=1, max_calls=WORKER_LIFE, max_retries=1)(_shard_task)
    limit = settings.in_flight or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque((shard, False) for shard in todo)
    running: dict[Any, tuple[PlannedShard, bool]] = {}
    with _sigterm() as stopped:
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    shard, guarded = waiting.popleft()
                    running[task.remote(store, settings, plan, shard, decoder, guarded)] = shard, guarded
                ready, _ = ray.wait(list(running), timeout=0.5)
                if stopped.is_set():
                    raise PixnerdError(
                        f"stopped by SIGTERM with {len(waiting) + len(running)} shards left",
                        remedy="run the same command again; it goes on from there",
                    )
                for ref in ready:
                    shard, guarded = running.pop(ref)
                    records = _result(ref, shard, guarded)
                    if records is None:
                        waiting.appendleft((shard, True))
                    else:
                        yield records
        finally:
            for ref in running:
                ray.cancel(ref)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=10)


def _result(ref: Any, shard: PlannedShard, guarded: bool) -> list[ShardRecord] | None:
    """None if the task's process died, twice, so that its items must be tried one by one."""
    import ray
    from ray import exceptions

    try:
        records: list[ShardRecord] = ray.get(ref)
    except exceptions.RayTaskError as error:
        raise error.cause from None
    except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError) as error:
        if guarded:
            raise ClusterError(
                f"shard {shard.number} kills its worker even with its decoder in a process of its own ({error})",
                remedy="look for the out-of-memory killer in the node's log; give the cluster more memory per CPU",
            ) from None
        return None
    return records


def _shard_task(
    store: Store, settings: PrepareSettings, plan: str, shard: PlannedShard, decoder: Decoder | None, guarded: bool
) -> list[ShardRecord]:
    """What a Ray worker does. torch is imported here, in the worker, not by whoever plans."""
    import torch

    from data_prep import make, quarantine
    from data_prep.decode import decode

    torch.set_num_threads(1)  # a task is one CPU
    outcomes = partial(
        quarantine.outcomes if guarded else make.plain_outcomes, settings=settings, decoder=decoder or decode
    )
    return make.make_shard(store, settings, plan, shard, outcomes)


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of the end of the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's business
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Tally:
    plan: Plan
    sizes: list[str]
    done: set[int] = field(default_factory=set)
    inputs: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = 0.0
    inputs_before: int = 0

    def begin(self) -> None:
        """From here on it is this run's speed."""
        self.began, self.inputs_before = time.monotonic(), self.inputs

    def add(self, records: list[ShardRecord]) -> None:
        self.done.add(records[0].number)
        self.inputs += records[0].inputs
        for record in records:
            self.accepted[record.size] += record.accepted
            self.rejected.setdefault(record.size, Counter()).update(record.rejected)
            self.versions[repr(sorted(record.versions.items()))] = record.versions

    def progress(self) -> Progress:
        speed = (self.inputs - self.inputs_before) / max(time.monotonic() - self.began, 1e-9)
        return Progress(
            shards=len(self.done),
            planned_shards=len(self.plan.shards),
            inputs=self.inputs,
            planned_inputs=self.plan.rows,
            accepted=dict(self.accepted),
            rejected={size: dict(causes) for size, causes in self.rejected.items()},
            per_second=speed,
            seconds_left=(self.plan.rows - self.inputs) / speed if speed else None,
        )

    def summary(self) -> PrepareSummary:
        assert self.inputs == self.plan.rows, "an input was lost or counted twice"
        sizes = {
            size: SizeSummary(
                shards=shard_prefix(self.plan.digest, size),
                count=len(self.done),
                accepted=self.accepted[size],
                rejected=dict(sorted(self.rejected[size].items())),
            )
            for size in self.sizes
        }
        versions = [self.versions[name] for name in sorted(self.versions)]
        return PrepareSummary(plan=self.plan.digest, inputs=self.inputs, sizes=sizes, versions=versions)

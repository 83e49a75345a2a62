"""What the records of runs and attempts tell: what is at work, what has become of each stage, and why.

It is told to whoever has the store's URL. Nothing here reads a corpus, a recipe's file, or anything heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from infra import layout
from infra.claim import PATIENCE_SECONDS
from infra.errors import DataError, NotFound, RecordError, SettingsError
from infra.records import Record, read_record
from infra.store import Store
from orchestration.history import RunEnd, RunStage, WorkflowRun
from orchestration.lease import Tried, tried

READERS = 16  # records that are read at once
LOOK_BACK = 64  # runs that are searched for what a stage was before

T = TypeVar("T")
V = TypeVar("V")
R = TypeVar("R", bound=Record)


class StageNow(NamedTuple):
    """What has become of a stage in a run."""

    stage: str
    kind: str
    digest: str
    state: str  # done, reused, running, failed, stopped, taken over, silent, skipped, not begun
    why: str


class RunNow(NamedTuple):
    record: WorkflowRun
    state: str  # done, failed, stopped, running; silent: no end was recorded, and its heartbeat stands still
    why: str
    stages: dict[str, StageNow]


class Explained(NamedTuple):
    run: WorkflowRun
    now: StageNow
    reason: str  # why its work was to be done, or not
    attempts: list[Tried]


class Runs:
    """The runs that a store holds records of."""

    def __init__(self, store: Store) -> None:
        self.store = store
        with ThreadPoolExecutor(3) as pool:
            begun = pool.submit(lambda: [layout.RUN.parts(key)["run"] for key in layout.RUN.keys(store)])
            notes = pool.submit(lambda: {entry.key: entry.modified for entry in store.list(layout.RUNNING.under())})
            clock = pool.submit(store.now)
            self.names: list[str] = begun.result()  # the oldest first
            self._notes, self._clock = notes.result(), clock.result()

    def newest(self, count: int) -> list[str]:
        """The newest runs, and all that are at work whatever their age; the oldest of them first."""
        at_work = [name for name in self.names if self._silence(name) is not None]
        return sorted({*self.names[len(self.names) - count :], *at_work})

    def look(self, names: Iterable[str]) -> list[RunNow]:
        """What the records tell of these runs, without those whose record cannot be read."""
        return [run for run in _at_once(self._look, names) if run is not None]

    def explain(self, stage: str, workflow: str | None = None, run: str | None = None) -> Explained:
        """The stage in the newest run that has it, of this workflow if one is given; or in the run that is named."""
        newest, before = self._with_stage(stage, workflow, run)
        now, *earlier = self.look([newest.run, *([before.run] if before else [])])
        of_stage = now.stages[stage]
        reason = _reason(stage, now, earlier[0] if earlier else None)
        return Explained(newest, of_stage, reason, tried(self.store, of_stage.kind, of_stage.digest))

    def _look(self, name: str) -> RunNow | None:
        record = self._record(name)
        if record is None:
            return None
        end = _read(self.store, layout.RUN_END.at(run=name), RunEnd)
        silence = self._silence(name)
        state, why = "silent", "killed, or its machine is away; the same command goes on from there"
        if end is not None:
            state, why = str(end.state), end.why
        elif silence is not None and silence < PATIENCE_SECONDS:
            state, why = "running", f"last heard of {silence:.0f} s ago"
        return RunNow(record, state, why, {stage: self._stage(record, end, stage) for stage in record.order})

    def _stage(self, run: WorkflowRun, end: RunEnd | None, stage: str) -> StageNow:
        first = run.stages[stage]
        ended = end.stages.get(stage) if end is not None else None
        if ended is not None and ended.event not in ("running", "waiting"):
            state = {"finished": "done"}.get(ended.event, ended.event)
            return StageNow(stage, ended.kind, ended.digest_of_work, state, ended.text)
        if first.settled and first.done:
            return StageNow(stage, first.kind, first.digest_of_work, "reused", "was done before the run")
        settled = _read(self.store, layout.RUN_STAGE.at(run=run.run, stage=stage), RunStage)
        if settled is None:
            return StageNow(stage, first.kind, first.digest_of_work, "not begun", "")
        if settled.reused:
            return StageNow(stage, settled.kind, settled.digest_of_work, "reused", "")
        attempts = tried(self.store, settled.kind, settled.digest_of_work)
        own = [one for one in attempts if one.attempt.run == run.run]
        state, why = told(own[-1], self._clock) if own else ("not begun", "")
        return StageNow(stage, settled.kind, settled.digest_of_work, state, why)

    def _with_stage(self, stage: str, workflow: str | None, run: str | None) -> tuple[WorkflowRun, WorkflowRun | None]:
        """The newest run that has the stage, and the run before it in which the stage was another, if there is one."""
        if run is not None and run not in self.names:
            raise SettingsError(f"there is no run {run} in {self.store.url}", remedy="`pixnerd status` lists them")
        names = self.names if run is None else self.names[: self.names.index(run) + 1]
        found: WorkflowRun | None = None
        for start in range(len(names), 0, -READERS):
            for record in _at_once(self._record, names[max(0, start - READERS) : start][::-1]):
                if record is None:
                    continue
                if stage not in record.stages or workflow not in (None, record.workflow):
                    if run is not None and found is None:
                        raise self._unknown(stage, record)
                    continue
                if found is None:
                    found = record
                elif record.workflow == found.workflow and _differ(stage, record, found):
                    return found, record
            if found is not None and len(names) - start > LOOK_BACK:
                break
        if found is None:
            raise self._unknown(stage, self._record(names[-1]) if names else None)
        return found, None

    def _unknown(self, stage: str, newest: WorkflowRun | None) -> DataError | SettingsError:
        if newest is None:
            return DataError(f"no run is recorded in {self.store.url}", remedy="check the URL, or run a workflow there")
        return SettingsError(
            f"no run that was looked at has a stage `{stage}`",
            remedy=f"the run {newest.run} of `{newest.workflow}` has {', '.join(newest.order)}",
        )

    def _record(self, name: str) -> WorkflowRun | None:
        with suppress(RecordError):
            return _read(self.store, layout.RUN.at(run=name), WorkflowRun)
        return None

    def _silence(self, name: str) -> float | None:
        """Seconds since the run's last heartbeat, all by the store's clock; None if it has no note any more."""
        key = layout.RUNNING.at(run=name)
        heard = self._notes.get(f"{key}{layout.BEAT}", self._notes.get(key))
        return None if heard is None else max(0.0, self._clock - heard)


def told(one: Tried, clock: float) -> tuple[str, str]:
    """The state of an attempt, and more words on it. `clock`: the moment, by the store's clock."""
    if one.end is not None:
        state = {"committed": "done", "partial": "done"}.get(one.end.how, one.end.how)
        unrecorded = one.end.how == "committed" and not one.recorded
        return state, "committed; the next run writes its record" if unrecorded else one.end.why
    silence = max(0.0, clock - one.heard)
    if silence >= PATIENCE_SECONDS:
        return "silent", f"nothing is heard of {one.attempt}; the next run takes it over"
    return "running", f"{one.attempt} is at work, last heard of {silence:.0f} s ago"


def changes(before: Any, after: Any, path: str = "") -> list[str]:
    """The settings that differ, as texts: `optim.lr 0.001 -> 0.0001`."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [c for k in keys for c in changes(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path} {before} -> {after}"]


def _differ(stage: str, one: WorkflowRun, other: WorkflowRun) -> bool:
    """Whether the stage has other work in the two runs, as far as was known when they began."""
    first, second = one.stages[stage], other.stages[stage]
    if first.settled and second.settled:
        return first.digest_of_work != second.digest_of_work
    if first.settings != second.settings or first.inputs != second.inputs:
        return True
    return any(target not in one.stages or _differ(target, one, other) for target in first.inputs.values())


def _reason(stage: str, now: RunNow, before: RunNow | None) -> str:
    first = now.record.stages[stage]
    if first.settled and first.done:
        return "its work was done before this run"
    if before is None:
        return "no earlier run has done other work in its place"
    changed = changes(before.record.stages[stage].settings, first.settings)
    if changed:
        return f"changed since the run {before.record.run}: {', '.join(changed)}"
    others = [
        target
        for target in dict.fromkeys(first.inputs.values())
        if target in now.stages
        and target in before.stages
        and now.stages[target].digest != before.stages[target].digest
    ]
    if others:
        return f"what it reads is not as it was in the run {before.record.run}: {', '.join(others)}"
    return "neither its settings nor the stages that it reads have changed; perhaps files outside of the workflow have"


def _read(store: Store, key: str, kind: type[R]) -> R | None:
    with suppress(NotFound):
        return read_record(store, key, kind)
    return None


def _at_once(work: Callable[[V], T], values: Iterable[V]) -> list[T]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(work, values))

"""The graph of a recipe's stages: which are done, which must run and why, and running those.

Every stage has a digest, made of its kind, its settings that change results, and the digests of the stages that it
reads. The stage's record lies under that digest; if the record exists, the stage is done. So a changed setting gives
new digests to that stage and to all that read it, and they run again. The records of all other stages are found and
reused, in this workflow and in any other on the same store.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal

from infra import layout
from infra.causes import explained, first_line
from infra.config import Settings, digest
from infra.errors import (
    NotFound,
    NotNow,
    PixnerdError,
    RecordError,
    SettingsError,
    StageFailed,
    Stopped,
    StoreError,
    TakenOver,
)
from infra.records import GateOutput, StageRecord, read_record
from infra.store import Store
from infra.tracking import NOWHERE
from orchestration.lease import Attempt, Driver, Lease
from orchestration.parsing import inputs_of, parse_stages
from orchestration.stage_log import StageLog
from orchestration.status import changes
from pipelines.recipes import Recipe
from pipelines.stages.base import Context, Progress, StageKind
from pipelines.stages.kinds import versions


@dataclass(frozen=True)
class Node:
    name: str
    kind: StageKind
    settings: Settings
    inputs: dict[str, str]  # setting that names a stage ("data", "scores.0") -> that stage's name
    input_digests: dict[str, str]  # the same setting -> that stage's digest
    digest: str = ""
    settled: bool = False  # True once all stages that it reads have run: until then the digest may change
    closed: str = ""  # why it is not promoted, if a gate before it is closed

    @property
    def key(self) -> str:
        return layout.STAGE.at(kind=self.kind.name, digest=self.digest)


# open: known only once the stages that it reads have run; closed: a gate before it is closed
State = Literal["done", "open", "new", "closed"]


@dataclass(frozen=True)
class Plan:
    node: Node
    state: State
    why: str


def graph(recipe: Recipe, store: Store | None = None) -> list[Node]:
    """The recipe's stages, each after those that it reads. Every setting is checked before any work begins.

    A digest also covers what a stage reads from outside of the workflow, such as files of a corpus, as they are now.
    Where that depends on the output of a stage that has not run, `run` computes the digest again after that stage.
    """
    parsed = parse_stages(recipe)
    nodes: dict[str, Node] = {}
    known = Known()

    def add(name: str) -> None:
        if name in nodes:
            return
        kind, settings = parsed[name]
        inputs = inputs_of(name, parsed)
        for target in inputs.values():
            add(target)
        digests = {field: nodes[target].digest for field, target in inputs.items()}
        node = nodes[name] = _digested(Node(name, kind, settings, inputs, digests), store, known)
        if node.closed:
            known.closed[name] = node.closed
        elif store is not None and is_done(node, store):
            known.records[name] = read_record(store, node.key, StageRecord)

    for name in parsed:
        add(name)
    return list(nodes.values())


def is_done(node: Node, store: Store) -> bool:
    """Whether the stage's record exists; never for a digest that is not settled, whose record may be of other work."""
    return node.settled and store.exists(node.key)


@dataclass(frozen=True)
class Known:
    """What is known of stages that are over, by their names."""

    records: dict[str, StageRecord] = dataclasses.field(default_factory=dict)
    closed: dict[str, str] = dataclasses.field(default_factory=dict)  # those that are not promoted, and why

    def inputs(self, node: Node) -> dict[str, StageRecord]:
        """The records that the stage reads, by the setting that names them, as far as they are there."""
        return {name: self.records[target] for name, target in node.inputs.items() if target in self.records}

    def missing(self, node: Node) -> list[str]:
        """The stages that it reads and that are not over."""
        targets = dict.fromkeys(node.inputs.values())
        return [target for target in targets if target not in self.records and target not in self.closed]

    def why_closed(self, node: Node) -> str:
        """Why the stage is not promoted; empty if it is. What reads all stages does without those that are not."""
        for target in () if node.kind.reads_all else node.inputs.values():
            if target in self.closed:
                return self.closed[target]
            output = self.records[target].output if target in self.records else None
            if isinstance(output, GateOutput) and not output.passed:
                missed = [f"{rule.score} is {rule.value:.3f}, not {rule.limit}" for rule in output.failed()]
                return f"not promoted: the gate `{target}` is closed ({'; '.join(missed)})"
        return ""


def _digested(node: Node, store: Store | None, known: Known) -> Node:
    """The node with its digest, as far as the records of the stages that it reads are there."""
    kind, settings = node.kind, node.settings
    try:
        outside = kind.outside(settings, store, known.inputs(node))
    except SettingsError as error:
        raise SettingsError(f"`{node.name}`: {error.message}", remedy=error.remedy) from None
    kind_of_work = {"kind": kind.name, "format": kind.format}
    work = {**kind_of_work, "settings": settings.chosen(), "inputs": node.input_digests, "outside": outside}
    return replace(node, digest=digest(work), settled=not known.missing(node), closed=known.why_closed(node))


def _settled(node: Node, store: Store, known: Known) -> Node:
    """The node with its digest computed from what the stages have given that have run before it."""
    if node.settled:
        return node
    digests = node.input_digests | {name: record.digest_of_work for name, record in known.inputs(node).items()}
    return _digested(replace(node, input_digests=digests), store, known)


def only(nodes: Sequence[Node], kind: str) -> list[Node]:
    """The stages of a kind and all stages that they need, directly or not."""
    by_name = {node.name: node for node in nodes}
    needed: set[str] = set()

    def need(name: str) -> None:
        if name not in needed:
            needed.add(name)
            for target in by_name[name].inputs.values():
                need(target)

    for node in nodes:
        if node.kind.name == kind:
            need(node.name)
    if not needed:
        raise SettingsError(f"the recipe has no `{kind}` stage", remedy=f"its stages: {', '.join(by_name)}")
    return [node for node in nodes if node.name in needed]


Earlier = Callable[[str], dict[str, StageRecord]]  # a kind -> its records in the store, by digest


def plan(nodes: Sequence[Node], store: Store) -> list[Plan]:
    """What a run would do to each stage, and why."""

    @cache
    def earlier(kind: str) -> dict[str, StageRecord]:
        records = {}
        for key in layout.STAGE.keys(store, kind=kind):
            # A record that is damaged or just deleted belongs to other work: `is_done` has looked for the node's own.
            with suppress(RecordError, NotFound):
                record = read_record(store, key, StageRecord)
                records[record.digest_of_work] = record
        return records

    by_name = {node.name: node for node in nodes}
    plans: dict[str, Plan] = {}
    for node in nodes:
        if node.closed:
            plans[node.name] = Plan(node, "closed", node.closed)
        elif is_done(node, store):
            plans[node.name] = Plan(node, "done", f"its record is {node.key}")
        elif _may_be_recorded(node, by_name, earlier):
            waits = [name for name in dict.fromkeys(node.inputs.values()) if plans[name].state in ("open", "new")]
            why = f"waits for {', '.join(waits)}; reused if what it reads is then as it was"
            plans[node.name] = Plan(node, "open", why)
        else:
            plans[node.name] = Plan(node, "new", _why_new(node, plans, earlier))
    return list(plans.values())


def _may_be_recorded(node: Node, nodes: dict[str, Node], earlier: Earlier) -> bool:
    """Whether one of the store's records may turn out to be the node's once the stages that it reads have run."""
    records = () if node.settled else earlier(node.kind.name).values()
    return any(_fits(record, node, nodes, earlier) for record in records)


def _fits(record: StageRecord, node: Node, nodes: dict[str, Node], earlier: Earlier) -> bool:
    """Whether record and node have the same settings and may have the same inputs.

    What a stage reads from outside of the workflow is not compared: records do not tell it.
    """
    return (
        _agree(record.settings, node.settings.results(), node.settings.chosen())
        and record.inputs.keys() == node.inputs.keys()
        and all(_may_get(nodes[node.inputs[field]], old, nodes, earlier) for field, old in record.inputs.items())
    )


def _agree(before: Any, now: Any, chosen: Any) -> bool:
    """Whether recorded settings equal today's; a setting that is newer than the record must have its default."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return bool(before == now)
    new = now.keys() - before.keys()
    chosen = chosen if isinstance(chosen, dict) else {}
    return not new & chosen.keys() and all(
        _agree(before[name], now[name], chosen.get(name, {})) for name in now.keys() - new
    )


def _may_get(node: Node, old_digest: str, nodes: dict[str, Node], earlier: Earlier) -> bool:
    """Whether the node's digest may turn out to be one that earlier work had."""
    if node.settled or old_digest == node.digest:
        return old_digest == node.digest
    record = earlier(node.kind.name).get(old_digest)
    if record is not None:
        return _fits(record, node, nodes, earlier)
    return all(old_digest != other.digest for other in nodes.values() if other.settled)  # its record was deleted


def _why_new(node: Node, plans: dict[str, Plan], earlier: Earlier) -> str:
    own = [record for record in earlier(node.kind.name).values() if record.stage == node.name]
    last = max(own, key=lambda record: record.started, default=None)
    changed = [] if last is None else changes(last.settings, node.settings.results())
    if last is not None and changed:
        return f"changed since {last.started}: {', '.join(changed)}"
    new = [name for name in dict.fromkeys(node.inputs.values()) if plans[name].state == "new"]
    if new:
        return f"follows {', '.join(new)}"
    if last is None:
        return "has not run yet"
    if last.inputs == node.input_digests:
        return "what it reads besides other stages is not as it was last time: files, or what is forgotten"
    return "its inputs are others than last time"


Say = Callable[[Node, str, str], None]  # a node, an event such as "running" (see terminal.Screen), more words on it
WAIT_SECONDS = 1.0  # between looks at stages that other drivers have


def run(
    nodes: Sequence[Node], context: Context, say: Say, driver: Driver | None = None, *, known: Known | None = None
) -> dict[str, StageRecord]:
    """Run what is not done. After a failure the stages that need no failed one still run; then the error is raised.

    A stage that another driver has is left to it, and its record is used once that is there. With `known`, what has
    become of stages before these, nothing is waited for: NotNow is raised instead.
    """
    return _Run(context, say, driver or Driver(context.store), known).through(nodes)


def finished(nodes: Sequence[Node], store: Store, say: Say) -> dict[str, StageRecord]:
    """The records of stages that are over; each that is done is reported as reused."""
    records = {node.name: read_record(store, node.key, StageRecord) for node in nodes if not node.closed}
    for node in nodes:
        if node.closed:
            say(node, "skipped", node.closed)
        else:
            say(node, "reused", f"done {records[node.name].started}, took {records[node.name].seconds:.1f} s")
    return records


class _Run:
    """One driver on its way through the stages."""

    def __init__(self, context: Context, say: Say, driver: Driver, known: Known | None) -> None:
        self.context, self.store, self.say, self.driver = context, context.store, say, driver
        self.known, self.waits = known or Known(), known is None
        self.begun: set[str] = set()
        self.failures: dict[str, PixnerdError] = {}
        self.told: set[str] = set()  # logs of other drivers' attempts that were told of: each attempt has its own

    def through(self, nodes: Sequence[Node]) -> dict[str, StageRecord]:
        pending = {node.name: node for node in nodes}
        while pending:
            ready = [node for node in pending.values() if not pending.keys() & set(node.inputs.values())]
            over = next((node.name for node in ready if self.is_over(node)), None)
            if over is not None:
                del pending[over]
            else:
                self.driver.pause(WAIT_SECONDS)
        for name, failed in self.failures.items():
            raise StageFailed(f"the stage `{name}` failed: {failed.message}", remedy=failed.remedy) from failed
        return self.known.records

    def is_over(self, node: Node) -> bool:
        """Do what there is to do about a stage; False if another driver has it."""
        try:
            return self.step(node)
        except NotNow:
            raise
        except Exception as error:
            failure = explained(error) or _unexpected(node, error)
            # A store that does not even tell what is done would fail every other stage as well, each after long waits.
            if isinstance(failure, Stopped) or (isinstance(failure, StoreError) and node.name not in self.begun):
                raise
            self.failures[node.name] = failure
            self.say(node, "failed", str(failure))
            return True

    def step(self, node: Node) -> bool:
        missing = self.known.missing(node)
        if missing and not node.kind.reads_all:
            self.say(node, "skipped", f"needs {', '.join(missing)}")
            return True
        node = _settled(node, self.store, self.known)
        if node.closed:
            self.known.closed[node.name] = node.closed
            self.say(node, "skipped", node.closed)
            return True
        if missing:  # work without the stages that failed is other work than that with them
            node = replace(node, digest=digest([node.digest, "without", missing]))
        lease = None if is_done(node, self.store) else self.driver.take(node.name, node.kind.name, node.digest)
        if isinstance(lease, Lease):
            return self.do(node, lease)
        if isinstance(lease, Attempt):
            return self.is_done_by_another(node, lease)
        self.known.records.update(finished([node], self.store, self.say))
        return True

    def is_done_by_another(self, node: Node, attempt: Attempt) -> bool:
        if not self.waits and self.driver.is_heard(attempt):
            raise not_now(node, attempt)
        if attempt.log not in self.told:
            self.told.add(attempt.log)
            self.say(node, "waiting", f"{attempt} is at work on it")
        return False

    def do(self, node: Node, lease: Lease) -> bool:
        self.begun.add(node.name)
        self.say(node, "running", "")
        began = time.perf_counter()
        try:
            self.known.records[node.name] = self.attempt(node, lease)
        except TakenOver as error:
            if not lease.lost:
                raise
            self.say(node, "waiting", error.message)
            return False
        # Not the record's `seconds`: another run may have been first to write it.
        self.say(node, "finished", f"{time.perf_counter() - began:.1f} s")
        return True

    def attempt(self, node: Node, lease: Lease) -> StageRecord:
        """Do a stage's work under a lease. Its run in MLflow ends after the attempt, as only the holder may end it."""
        run, log = NOWHERE, StageLog(self.store, lease.attempt.log)

        def show(stage: str, so_far: Progress) -> None:
            log.progress(so_far)
            self.context.show(stage, so_far)

        with log.listening(), lease.beating(also=log.send):
            log.line(f"begun by {lease.attempt}")
            try:
                context = self.context.for_stage(node.name, node.kind.name, node.digest)
                run = context.run
                record = self.work(node, replace(context, show=show, check_held=lease.check))
                if self.known.missing(node):
                    # Not stored: made without stages that failed, so it must be made again when they have run.
                    lease.give_up("partial", f"made without {', '.join(self.known.missing(node))}")
                else:
                    record = lease.commit(record)
            except BaseException as error:
                log.failure(error)
                stopped = not isinstance(error, Exception) or isinstance(error, Stopped)
                why = str(explained(error) or f"{type(error).__name__}: {first_line(error)}")
                if lease.give_up("stopped" if stopped else "failed", why):
                    run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
            log.line("finished")
        run.end()
        return record

    def work(self, node: Node, context: Context) -> StageRecord:
        started, clock = datetime.now(UTC), time.perf_counter()
        output = node.kind.work(context, node.settings, self.known.inputs(node))
        return StageRecord(
            stage=node.name,
            kind=node.kind.name,
            inputs=node.input_digests,
            digest_of_work=node.digest,
            settings=node.settings.results(),
            output=output,
            versions=versions(),
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 3),
        )


def not_now(node: Node, other: Attempt) -> NotNow:
    return NotNow(f"{other} is at work on the stage `{node.name}`", remedy="try again later")


def _unexpected(node: Node, error: Exception) -> PixnerdError:
    """An error that is a bug of ours, or of a library's, is a failure of its stage as any other."""
    failure = StageFailed(
        f"internal error: {type(error).__name__}: {first_line(error)}",
        remedy=f"`pixnerd logs {node.name}` shows where, and so does --debug",
    )
    failure.__cause__ = error
    return failure

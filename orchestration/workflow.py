"""The graph: skip what is done, run what is ready, go on after a crash, explain why.

A stage's digest is made of its kind, its settings that change results, and the digests of the stages it reads from.
Its record lies under that digest; if it is there the stage is done. So a changed setting makes one stage and all that
follow it new, and everything else is found where it was, in this run and in any other workflow on the same store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from infra import layout
from infra.causes import explained
from infra.config import Settings, digest, nearest, parse
from infra.errors import Fault, NotFound, PixnerdError, RecordError, SettingsError, StageFailed, Stopped
from infra.problems import Wrong, shown, told, where
from infra.records import StageRecord, read_record, write_record
from infra.store import Store
from pipelines.recipes import Recipe
from pipelines.stages.base import Context, StageKind
from pipelines.stages.kinds import KINDS, versions


@dataclass(frozen=True)
class Node:
    name: str
    kind: StageKind
    settings: Settings
    inputs: dict[str, str]  # "data" or "scores.0" -> the stage it names
    below: dict[str, str]  # the same -> the digest of that stage's work
    digest: str
    settled: bool  # False while a stage that it reads from is to come: then the digest is worked out once more

    @property
    def key(self) -> str:
        return layout.STAGE.at(kind=self.kind.name, digest=self.digest)


State = Literal["done", "open", "new"]  # open: whether it must run is not known before other stages have run


@dataclass(frozen=True)
class Plan:
    node: Node
    state: State
    why: str


def graph(recipe: Recipe, store: Store | None = None) -> list[Node]:
    """The recipe's stages in the order in which they can run; every setting is checked before any work begins.

    What stages read from outside counts as it is there now; of the store, if there is one. Where the stages before one
    must tell what that is, and have not run, its digest is settled by `run` when they have.
    """
    parsed = _parsed(recipe)
    nodes: dict[str, Node] = {}
    done: dict[str, StageRecord] = {}

    def place(name: str, above: tuple[str, ...]) -> None:
        if name in nodes:
            return
        if name in above:
            circle = f"the stages {' -> '.join([*above, name])} wait for each other"
            raise recipe.refused([Fault(name, circle, "break the circle")])
        kind, settings = parsed[name]
        inputs = _inputs(name, parsed)
        for target in inputs.values():
            place(target, (*above, name))
        below = {field: nodes[target].digest for field, target in inputs.items()}
        records = {field: done[target] for field, target in inputs.items() if target in done}
        node = _node(name, kind, settings, inputs, below, store, records)
        nodes[name] = node
        if store is not None and is_done(node, store):
            done[name] = read_record(store, node.key, StageRecord)

    for name in parsed:
        place(name, ())
    return list(nodes.values())


Parsed = Mapping[str, tuple[StageKind, Settings]]


def _parsed(recipe: Recipe) -> Parsed:
    """The stages as settings. All that is wrong with them, and between them, is told at once."""
    parsed: dict[str, tuple[StageKind, Settings]] = {}
    faults: list[Fault] = []
    for name, data in recipe.stages.items():
        try:
            parsed[name] = parse_stage(name, data, recipe.defaults)
        except SettingsError as error:
            faults += error.faults or [Fault(name, error.message, error.remedy)]
    for name in parsed:
        faults += _misfits(name, recipe, parsed)
    if faults:
        raise recipe.refused(faults)
    return parsed


def _inputs(name: str, parsed: Parsed) -> dict[str, str]:
    kind, settings = parsed[name]
    return {n: n for n in parsed if n != name} if kind.reads_all else kind.references(settings)


def _misfits(name: str, recipe: Recipe, parsed: Parsed) -> Iterator[Fault]:
    """Where a stage does not go together with those that it names; those that are wrong themselves are not asked."""
    (kind, settings), inputs = parsed[name], _inputs(name, parsed)
    for field, target in inputs.items():
        if target not in recipe.stages:
            near = nearest(target, recipe.stages)
            remedy = f"did you mean `{near}`?" if near else f"its stages: {', '.join(recipe.stages)}"
            path = f"{name}.{field}"
            yield Fault(path, f"`{path}` names the stage `{target}`, which the recipe does not have", remedy)
    if not all(target in parsed for target in inputs.values()):
        return
    below = {field: parsed[target][1] for field, target in inputs.items()}
    for wrong in list(_other_kinds(kind, parsed, inputs)) or kind.check(settings, below):
        steps = tuple(int(part) if part.isdecimal() else part for part in wrong.field.split("."))
        written = {name: recipe.stages[name], f"defaults.{kind.name}": recipe.defaults.get(kind.name, {})}
        path = where(steps, recipe.stages[name], written)
        yield Fault(path, f"`{path}` {wrong.message}", wrong.remedy)


def _other_kinds(kind: StageKind, parsed: Parsed, inputs: Mapping[str, str]) -> Iterator[Wrong]:
    """Stages that are named where one of another kind is needed."""
    for field, target in inputs.items():
        needed = kind.takes.get(field.partition(".")[0])
        if needed is not None and parsed[target][0].name != needed:
            fitting = [name for name, (other, _) in parsed.items() if other.name == needed]
            yield Wrong(
                field,
                f"names `{target}`, whose kind is {parsed[target][0].name}, not {needed}",
                f"name {' or '.join(fitting)}" if fitting else f"add a stage of the kind {needed}",
            )


def is_done(node: Node, store: Store) -> bool:
    """Whether its work is recorded: what lies under a digest that is not settled may be a record of other work."""
    return node.settled and store.exists(node.key)


def _node(
    name: str,
    kind: StageKind,
    settings: Settings,
    inputs: dict[str, str],
    below: dict[str, str],
    store: Store | None,
    records: dict[str, StageRecord],
) -> Node:
    try:
        outside = kind.outside(settings, store, records)
    except SettingsError as error:
        raise SettingsError(f"`{name}`: {error.message}", remedy=error.remedy) from None
    of = {"kind": kind.name, "format": kind.format}
    work = {**of, "settings": settings.chosen(), "inputs": below, "outside": outside}
    return Node(name, kind, settings, inputs, below, digest(work), settled=len(records) == len(inputs))


def _settled(node: Node, store: Store, done: dict[str, StageRecord]) -> Node:
    """The node as the records of the stages before it make it."""
    if node.settled:
        return node
    records = {field: done[target] for field, target in node.inputs.items() if target in done}
    below = node.below | {field: record.digest_of_work for field, record in records.items()}
    return _node(node.name, node.kind, node.settings, node.inputs, below, store, records)


def parse_stage(
    name: str, data: dict[str, Any], defaults: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> tuple[StageKind, Settings]:
    """`defaults`: what the stages of each kind start from; it is in the data already."""
    kind = KINDS.get(str(data.get("kind")))
    if kind is None:
        near = nearest(str(data.get("kind")), KINDS)
        remedy = f"did you mean `{near}`?" if near else f"known: {', '.join(KINDS)}"
        raise told(
            [Fault(f"{name}.kind", f"`{name}.kind` is {shown(data.get('kind'))}, which is not a kind of stage", remedy)]
        )
    settings = {k: v for k, v in data.items() if k != "kind"}
    return kind, parse(
        kind.settings, settings, where=name, shared={f"defaults.{kind.name}": defaults.get(kind.name, {})}
    )


def only(nodes: Sequence[Node], kind: str) -> list[Node]:
    """The stages of a kind and all that they need."""
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
        found = {}
        for key in layout.STAGE.keys(store, kind=kind):
            # One that is damaged or just deleted is unrelated work's: a stage's own is read before this.
            with suppress(RecordError, NotFound):
                record = read_record(store, key, StageRecord)
                found[record.digest_of_work] = record
        return found

    by_name = {node.name: node for node in nodes}
    plans: dict[str, Plan] = {}
    for node in nodes:
        if is_done(node, store):
            plans[node.name] = Plan(node, "done", f"its record is {node.key}")
        elif _may_be_recorded(node, by_name, earlier):
            waits = [name for name in dict.fromkeys(node.inputs.values()) if plans[name].state != "done"]
            why = f"waits for {', '.join(waits)}; reused if what it reads is then as it was"
            plans[node.name] = Plan(node, "open", why)
        else:
            plans[node.name] = Plan(node, "new", _why_new(node, plans, earlier))
    return list(plans.values())


def _may_be_recorded(node: Node, nodes: dict[str, Node], earlier: Earlier) -> bool:
    """Whether one of the records may turn out to be the node's once the stages that it reads from have run."""
    records = () if node.settled else earlier(node.kind.name).values()
    return any(_fits(record, node, nodes, earlier) for record in records)


def _fits(record: StageRecord, node: Node, nodes: dict[str, Node], earlier: Earlier) -> bool:
    """Whether the record is of the same settings and inputs; what is read from outside, no record tells."""
    return (
        _agree(record.settings, node.settings.results(), node.settings.chosen())
        and record.inputs.keys() == node.inputs.keys()
        and all(_may_be(nodes[node.inputs[field]], made, nodes, earlier) for field, made in record.inputs.items())
    )


def _agree(before: Any, now: Any, chosen: Any) -> bool:
    """Whether recorded settings are those of now; those that there were not yet then may have their defaults."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return bool(before == now)
    new = now.keys() - before.keys()
    chosen = chosen if isinstance(chosen, dict) else {}
    return not new & chosen.keys() and all(
        _agree(before[name], now[name], chosen.get(name, {})) for name in now.keys() - new
    )


def _may_be(node: Node, made: str, nodes: dict[str, Node], earlier: Earlier) -> bool:
    """Whether a digest that was made before may turn out to be the node's."""
    if node.settled or made == node.digest:
        return made == node.digest
    record = earlier(node.kind.name).get(made)
    if record is not None:
        return _fits(record, node, nodes, earlier)
    return all(made != other.digest for other in nodes.values() if other.settled)  # its record was deleted


def _why_new(node: Node, above: dict[str, Plan], earlier: Earlier) -> str:
    own = [record for record in earlier(node.kind.name).values() if record.stage == node.name]
    last = max(own, key=lambda record: record.started, default=None)
    changed = [] if last is None else _changes(last.settings, node.settings.results())
    if last is not None and changed:
        return f"changed since {last.started}: {', '.join(changed)}"
    new = [name for name in dict.fromkeys(node.inputs.values()) if above[name].state == "new"]
    if new:
        return f"follows {', '.join(new)}"
    if last is None:
        return "has not run yet"
    if last.inputs == node.below:
        return "what it reads besides other stages is not as it was last time: files, or what is forgotten"
    return "its inputs are others than last time"


def _changes(before: Any, after: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [c for k in keys for c in _changes(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path} {before} -> {after}"]


Say = Callable[[Node, str, str], None]


def run(nodes: list[Node], context: Context, say: Say) -> dict[str, StageRecord]:
    """Runs what is not done. A failed stage stops those that need it; the others run, then the failure is told."""
    records: dict[str, StageRecord] = {}
    failures: dict[str, PixnerdError] = {}
    for node in nodes:
        missing = [target for target in node.inputs.values() if target not in records]
        if missing and not node.kind.reads_all:
            say(node, "skipped", f"needs {', '.join(dict.fromkeys(missing))}")
            continue
        node = _settled(node, context.store, records)
        if is_done(node, context.store):
            records |= finished([node], context.store, say)
            continue
        say(node, "running", "")
        began = time.perf_counter()
        try:
            records[node.name] = _run_one(node, context, records)
        except Exception as error:
            failure = explained(error)
            if failure is None or isinstance(failure, Stopped):
                raise
            failures[node.name] = failure
            say(node, "failed", str(failure))
        else:
            # Its record may be of another run that was faster.
            say(node, "finished", f"{time.perf_counter() - began:.1f} s")
    for name, failed in failures.items():
        raise StageFailed(f"the stage `{name}` failed: {failed.message}", remedy=failed.remedy) from failed
    return records


def finished(nodes: Sequence[Node], store: Store, say: Say) -> dict[str, StageRecord]:
    """The records of stages that are done."""
    records = {node.name: read_record(store, node.key, StageRecord) for node in nodes}
    for node in nodes:
        say(node, "reused", f"done {records[node.name].started}, took {records[node.name].seconds:.1f} s")
    return records


def _run_one(node: Node, context: Context, records: dict[str, StageRecord]) -> StageRecord:
    started, clock = datetime.now(UTC), time.perf_counter()
    inputs = {field: records[target] for field, target in node.inputs.items() if target in records}
    stage_context = context.for_stage(node.name, node.kind.name, node.digest)
    try:
        output = node.kind.work(stage_context, node.settings, inputs)
    except BaseException as error:
        stage_context.run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    stage_context.run.end()
    record = StageRecord(
        stage=node.name,
        kind=node.kind.name,
        inputs=node.below,
        digest_of_work=node.digest,
        settings=node.settings.results(),
        output=output,
        versions=versions(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
    )
    if len(inputs) < len(node.inputs):
        return record  # made without stages that failed: it must be made again when they are there
    write_record(context.store, node.key, record)
    return read_record(context.store, node.key, StageRecord)

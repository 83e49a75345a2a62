"""The graph of a recipe's stages: which are done, which must run and why, and running those.

Every stage has a digest, made of its kind, its settings that change results, and the digests of the stages that it
reads. The stage's record lies under that digest; if the record exists, the stage is done. So a changed setting gives
new digests to that stage and to all that read it, and they run again. The records of all other stages are found and
reused, in this workflow and in any other on the same store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from infra import layout
from infra.causes import explained
from infra.config import Settings, digest, parse
from infra.errors import Fault, NotFound, PixnerdError, RecordError, SettingsError, StageFailed, Stopped
from infra.problems import Wrong, did_you_mean, settings_error, shown, where
from infra.records import StageRecord, read_record, recorded
from infra.store import Store
from pipelines.recipes import Recipe
from pipelines.stages.base import Context, StageKind
from pipelines.stages.kinds import KINDS, versions


@dataclass(frozen=True)
class Node:
    name: str
    kind: StageKind
    settings: Settings
    inputs: dict[str, str]  # setting that names a stage ("data", "scores.0") -> that stage's name
    input_digests: dict[str, str]  # the same setting -> that stage's digest
    digest: str = ""
    settled: bool = False  # True once all stages that it reads have run: until then the digest may change

    @property
    def key(self) -> str:
        return layout.STAGE.at(kind=self.kind.name, digest=self.digest)


State = Literal["done", "open", "new"]  # open: known only once the stages that it reads have run


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
    done_records: dict[str, StageRecord] = {}

    def add(name: str) -> None:
        if name in nodes:
            return
        kind, settings = parsed[name]
        inputs = _inputs(name, parsed)
        for target in inputs.values():
            add(target)
        digests = {field: nodes[target].digest for field, target in inputs.items()}
        records = {field: done_records[target] for field, target in inputs.items() if target in done_records}
        node = nodes[name] = _digested(Node(name, kind, settings, inputs, digests), store, records)
        if store is not None and is_done(node, store):
            done_records[name] = read_record(store, node.key, StageRecord)

    for name in parsed:
        add(name)
    return list(nodes.values())


Parsed = Mapping[str, tuple[StageKind, Settings]]


def parse_stages(recipe: Recipe) -> Parsed:
    """Each stage's kind and settings; one error tells all that is wrong with them and between them."""
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
    _refuse_circles(recipe, parsed)
    return parsed


def _refuse_circles(recipe: Recipe, parsed: Parsed) -> None:
    fine: set[str] = set()

    def visit(name: str, readers: tuple[str, ...]) -> None:
        if name in readers:
            circle = f"the stages {' -> '.join([*readers, name])} wait for each other"
            raise recipe.refused([Fault(name, circle, "break the circle")])
        if name not in fine:
            for target in _inputs(name, parsed).values():
                visit(target, (*readers, name))
            fine.add(name)

    for name in parsed:
        visit(name, ())


def _inputs(name: str, parsed: Parsed) -> dict[str, str]:
    kind, settings = parsed[name]
    return {n: n for n in parsed if n != name} if kind.reads_all else kind.references(settings)


def _misfits(name: str, recipe: Recipe, parsed: Parsed) -> Iterator[Fault]:
    """What is wrong between a stage and those that it reads, as far as the settings of all of them are valid."""
    (kind, settings), inputs = parsed[name], _inputs(name, parsed)
    for field, target in inputs.items():
        if target not in recipe.stages:
            remedy = did_you_mean(target, recipe.stages, f"its stages: {', '.join(recipe.stages)}")
            path = f"{name}.{field}"
            yield Fault(path, f"`{path}` names the stage `{target}`, which the recipe does not have", remedy)
    if not all(target in parsed for target in inputs.values()):
        return
    input_settings = {field: parsed[target][1] for field, target in inputs.items()}
    for wrong in list(_other_kinds(kind, parsed, inputs)) or kind.check(settings, input_settings):
        steps = tuple(int(part) if part.isdecimal() else part for part in wrong.field.split("."))
        written = {name: recipe.stages[name], f"defaults.{kind.name}": recipe.defaults.get(kind.name, {})}
        path = where(steps, recipe.stages[name], written)
        yield Fault(path, f"`{path}` {wrong.message}", wrong.remedy)


def _other_kinds(kind: StageKind, parsed: Parsed, inputs: Mapping[str, str]) -> Iterator[Wrong]:
    """What is wrong where a setting names a stage of another kind than it needs."""
    for field, target in inputs.items():
        taken = kind.takes.get(field.partition(".")[0])
        needed = (taken,) if isinstance(taken, str) else taken
        if needed is not None and parsed[target][0].name not in needed:
            fitting = [name for name, (other, _) in parsed.items() if other.name in needed]
            yield Wrong(
                field,
                f"names `{target}`, whose kind is {parsed[target][0].name}, not {' or '.join(needed)}",
                f"name {' or '.join(fitting)}" if fitting else f"add a stage of the kind {' or '.join(needed)}",
            )


def is_done(node: Node, store: Store) -> bool:
    """Whether the stage's record exists; never for a digest that is not settled, whose record may be of other work."""
    return node.settled and store.exists(node.key)


def _digested(node: Node, store: Store | None, records: dict[str, StageRecord]) -> Node:
    """The node with its digest, as far as the records of the stages that it reads are there."""
    kind, settings = node.kind, node.settings
    try:
        outside = kind.outside(settings, store, records)
    except SettingsError as error:
        raise SettingsError(f"`{node.name}`: {error.message}", remedy=error.remedy) from None
    kind_of_work = {"kind": kind.name, "format": kind.format}
    work = {**kind_of_work, "settings": settings.chosen(), "inputs": node.input_digests, "outside": outside}
    return replace(node, digest=digest(work), settled=len(records) == len(node.inputs))


def _settled(node: Node, store: Store, done: dict[str, StageRecord]) -> Node:
    """The node with its digest computed from the records, by stage name, of the stages that have run before it."""
    if node.settled:
        return node
    records = {field: done[target] for field, target in node.inputs.items() if target in done}
    digests = node.input_digests | {field: record.digest_of_work for field, record in records.items()}
    return _digested(replace(node, input_digests=digests), store, records)


def parse_stage(
    name: str, data: dict[str, Any], defaults: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> tuple[StageKind, Settings]:
    """`defaults`: the recipe's, by kind. `data` contains them; errors use them to tell where a value was written."""
    kind = KINDS.get(str(data.get("kind")))
    if kind is None:
        path, wrong = f"{name}.kind", data.get("kind")
        remedy = did_you_mean(str(wrong), KINDS, f"known: {', '.join(KINDS)}")
        raise settings_error([Fault(path, f"`{path}` is {shown(wrong)}, which is not a kind of stage", remedy)])
    settings = {k: v for k, v in data.items() if k != "kind"}
    return kind, parse(
        kind.settings, settings, where=name, shared={f"defaults.{kind.name}": defaults.get(kind.name, {})}
    )


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
    changed = [] if last is None else _changes(last.settings, node.settings.results())
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


def _changes(before: Any, after: Any, path: str = "") -> list[str]:
    """The settings that differ, as texts: `optim.lr 0.001 -> 0.0001`."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [c for k in keys for c in _changes(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path} {before} -> {after}"]


Say = Callable[[Node, str, str], None]  # a node, an event such as "running" (see terminal.Screen), more words on it


def run(nodes: list[Node], context: Context, say: Say) -> dict[str, StageRecord]:
    """Run what is not done. After a failure the stages that need no failed one still run; then the error is raised."""
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
            # Not the record's `seconds`: another run may have been first to write it.
            say(node, "finished", f"{time.perf_counter() - began:.1f} s")
    for name, failed in failures.items():
        raise StageFailed(f"the stage `{name}` failed: {failed.message}", remedy=failed.remedy) from failed
    return records


def finished(nodes: Sequence[Node], store: Store, say: Say) -> dict[str, StageRecord]:
    """The records of stages that are done; each is reported as reused."""
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
        inputs=node.input_digests,
        digest_of_work=node.digest,
        settings=node.settings.results(),
        output=output,
        versions=versions(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
    )
    if len(inputs) < len(node.inputs):
        return record  # not stored: made without stages that failed, so it must be made again when they have run
    return recorded(context.store, node.key, record)

"""What `run`, `prepare`, `train` and `stage` do: read the recipe, plan its stages, run those that are not done."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data_prep.prepare.plan import PrepareSettings
from infra.cluster import ClusterSettings
from infra.errors import CheckpointError, NotNow, NotPromoted, SettingsError
from infra.problems import did_you_mean
from infra.records import EvalReport, EvaluateOutput, PrepareSummary, StageRecord, read_record
from infra.store import Store
from orchestration import history, parsing, running, terminal, workflow
from orchestration.context import cluster_of, context_of, home_of, store_of, tidy
from orchestration.lease import Driver, tried
from orchestration.patience import doing
from orchestration.terminal import print_json
from pipelines import recipes
from pipelines.stages.data import STAGE_URL
from pipelines.stages.fitting import check_training


def run(
    name: str,
    *,
    store: str | None,
    assignments: Sequence[str],
    address: str | None,
    dry_run: bool,
    as_json: bool,
    until: Literal["prepare", "train"] | None = None,
    retry_failed: bool = False,
) -> None:
    doing("reading the recipe, and what the store holds of it")
    recipe = recipes.load(name, assignments)
    opened, cluster = store_of(store, recipe), cluster_of(recipe, address)
    if retry_failed and dry_run:
        raise SettingsError("a retry is begun in the store", remedy="leave --dry-run out, or --retry-failed")
    if not dry_run:
        opened.probe()  # first, so that an unreachable store is reported at once
    nodes = _nodes(recipe, opened, until)
    if retry_failed and _retry_failed(recipe, opened, nodes, cluster.address):
        nodes = _nodes(recipe, opened, until)
    todo = [node for node in nodes if not node.closed and not workflow.is_done(node, opened)]
    if dry_run:
        plans = workflow.plan(nodes, opened)
        if as_json:
            given = ["--store", opened.url, *(part for each in assignments for part in ("--set", each))]
            given += ["--on", address] if address else []
            print_json([_planned(plan, ["pixnerd", "stage", name, plan.node.name, *given]) for plan in plans])
        else:
            terminal.show_plan(plans)
        running.Others(opened, _note).check()
        _check_fit(nodes, todo, cluster.address)
        return
    _check_fit(nodes, todo, cluster.address)
    if not todo:
        with terminal.Screen(quiet=as_json) as screen:
            records = workflow.finished(nodes, opened, _say(screen, opened))
    else:
        records = _run(recipe, opened, cluster, nodes, as_json=as_json)
    if as_json:
        print_json({name: record.model_dump(mode="json") for name, record in records.items()})
    else:
        terminal.show_result(records.values(), _reports(opened, records))


def stage(
    name: str, stage: str, *, store: str | None, assignments: Sequence[str], address: str | None, as_json: bool
) -> None:
    """Do one stage, whose inputs must be there; raises NotPromoted or NotNow where it is not to be done, or not yet."""
    doing("reading the recipe, and what the store holds of it")
    recipe = recipes.load(name, assignments)
    opened, cluster = store_of(store, recipe), cluster_of(recipe, address)
    opened.probe()
    nodes = {node.name: node for node in workflow.graph(recipe, opened)}
    if stage not in nodes:
        raise SettingsError(
            f"the recipe has no stage `{stage}`", remedy=did_you_mean(stage, nodes, f"its stages: {', '.join(nodes)}")
        )
    node = nodes[stage]
    if node.closed:
        raise NotPromoted(node.closed, remedy="train longer, or change the gate's rules on purpose")
    if workflow.is_done(node, opened):
        with terminal.Screen(quiet=as_json) as screen:
            records = workflow.finished([node], opened, _say(screen, opened))
    else:
        missing = _missing(node, nodes, opened)
        if missing:
            raise NotNow(f"`{stage}` needs {', '.join(missing)}", remedy="try again when that is done")
        _check_fit(list(nodes.values()), [node], cluster.address)
        _check_free(node, Driver(opened, ""))
        inputs = [nodes[target] for target in dict.fromkeys(node.inputs.values())]
        done = [each for each in inputs if not each.closed and workflow.is_done(each, opened)]
        known = workflow.Known(
            {each.name: read_record(opened, each.key, StageRecord) for each in done},
            {each.name: each.closed for each in inputs if each.closed},
        )
        records = _run(recipe, opened, cluster, [node], as_json=as_json, known=known)
    if as_json:
        print_json(records[stage].model_dump(mode="json"))


def _check_free(node: workflow.Node, driver: Driver) -> None:
    """Raise NotNow, before Ray is started and a run is recorded, if another driver is heard to be at work."""
    doing("listening for the driver that has the stage")
    while (other := driver.holder(node.kind.name, node.digest)) is not None:
        if driver.is_heard(other):
            raise workflow.not_now(node, other)
        driver.pause(workflow.WAIT_SECONDS)


def _missing(node: workflow.Node, nodes: Mapping[str, workflow.Node], store: Store) -> list[str]:
    """The stages that it waits for. What reads all stages does without those that failed, or need one that did."""
    inputs = [nodes[target] for target in dict.fromkeys(node.inputs.values())]
    missing = {each.name: each for each in inputs if not each.closed and not workflow.is_done(each, store)}
    if not node.kind.reads_all:
        return list(missing)
    failed: set[str] = set()
    for name, each in missing.items():  # each after those that it needs
        attempts = tried(store, each.kind.name, each.digest)
        if failed & set(each.inputs.values()) or (attempts and attempts[-1].failed()):
            failed.add(name)
    return [name for name in missing if name not in failed]


def _run(
    recipe: recipes.Recipe,
    store: Store,
    cluster: ClusterSettings,
    nodes: Sequence[workflow.Node],
    *,
    as_json: bool,
    known: workflow.Known | None = None,
) -> dict[str, StageRecord]:
    """Run stages, and keep a record of that. `known`: of stages before them, if only one of them is to be run."""
    tidy(store, home_of(store, recipe.name))
    stages = {
        node.name: history.StageOfRun(
            kind=node.kind.name,
            digest_of_work=node.digest,
            settled=node.settled,
            done=workflow.is_done(node, store),
            inputs=node.inputs,
            settings=node.settings.results(),
        )
        for node in nodes
    }
    run = history.new_run()
    begun = history.begun(run, recipe.name, recipe.model_dump(mode="json"), stages)
    journal = history.Journal(store, begun)
    with (
        running.noted(store, recipe.name, _note, run),
        journal.kept(),
        terminal.Screen(quiet=as_json) as screen,
        context_of(store, recipe, cluster, screen) as context,
    ):
        show = _say(screen, store)

        def say(node: workflow.Node, event: str, text: str) -> None:
            show(node, event, text)
            journal.note(node.name, node.kind.name, node.digest, event, text)

        return workflow.run(nodes, context, say, Driver(store, run), known=known)


def _planned(plan: workflow.Plan, command: Sequence[str]) -> dict[str, Any]:
    """What another engine needs to know of a stage. Of resources, null means as much as the cluster has."""
    node = plan.node
    return {
        "stage": node.name,
        "kind": node.kind.name,
        "state": plan.state,
        "why": plan.why,
        "digest": node.digest,
        "needs": list(dict.fromkeys(node.inputs.values())),
        "also_after_failures": node.kind.reads_all,
        "command": list(command),
        "resources": node.kind.needs(node.settings)._asdict(),
    }


def _nodes(recipe: recipes.Recipe, store: Store, until: Literal["prepare", "train"] | None) -> list[workflow.Node]:
    nodes = workflow.graph(recipe, store)
    return nodes if until is None else workflow.only(nodes, until)


def _check_fit(nodes: Sequence[workflow.Node], todo: Sequence[workflow.Node], address: str | None) -> None:
    """Raise, before any work begins, if one of the stages that are to be done cannot be trained as set."""
    doing("looking for encoders")
    try:
        check_training({node.name: node.settings for node in nodes}, [node.name for node in todo])
    except CheckpointError as error:
        if address is None:
            raise
        # The cluster's machines will load the encoders, and may have access that this machine lacks.
        print(f"warning: from this machine, {error}", file=sys.stderr)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _say(screen: terminal.Screen, store: Store) -> workflow.Say:
    """Shows what happened to a stage; for a prepare stage that has ended, also its counts and its speed."""

    def say(node: workflow.Node, event: str, text: str) -> None:
        if event in ("finished", "reused") and node.kind.name == "prepare":
            summary = read_record(store, node.key, StageRecord).of(PrepareSummary)
            speed = screen.own_per_second(summary.inputs) if event == "finished" else 0.0
            text = f"{text}, {terminal.prepared(summary, speed)}"
        screen.stage(node, event, text)

    return say


def _retry_failed(recipe: recipes.Recipe, store: Store, nodes: Sequence[workflow.Node], address: str | None) -> bool:
    """Make the failed downloads that may succeed now inputs of the coming run; False if there are none.

    Every refusal comes before the first retry is begun: a run that is refused changes nothing.
    """
    from data_prep.prepare.job import begin_retries, failed_downloads
    from data_prep.sources import UrlSource

    parsed = {name: parsing.parse_stage(name, data)[1] for name, data in recipe.stages.items()}
    stages = {name: settings for name, settings in parsed.items() if isinstance(settings, PrepareSettings)}
    for name, settings in stages.items():
        for source in settings.sources:
            if isinstance(source, UrlSource) and source.url.startswith(STAGE_URL):
                raise SettingsError(
                    f"the downloads of `{name}.{source.name}` cannot be tried again: another stage makes its list",
                    remedy="give the folder that it made as the source's `url`; what is downloaded stays valid",
                )
    doing("looking for downloads that failed")
    retries_by_stage = {name: failed_downloads(store, settings) for name, settings in stages.items()}
    any_failed = any(retry.failed.num_rows for retries in retries_by_stage.values() for retry in retries)
    if any_failed:
        _check_fit(nodes, nodes, address)
    for name, retries in retries_by_stage.items():
        print(f"{name}: {begin_retries(store, retries):,} downloads are tried again", file=sys.stderr)
    return any_failed


def _reports(store: Store, records: dict[str, StageRecord]) -> list[dict[str, EvalReport]]:
    """The evaluation reports of each protocol, by the name of the train stage whose checkpoint was scored."""
    trained = {record.digest_of_work: name for name, record in records.items()}
    reports: dict[str, dict[str, EvalReport]] = {}
    for name, record in records.items():
        if isinstance(record.output, EvaluateOutput):
            report = read_record(store, record.output.record, EvalReport)
            reports.setdefault(report.protocol, {})[trained.get(record.inputs["checkpoint"], name)] = report
    return list(reports.values())

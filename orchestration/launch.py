"""What the commands `run`, `prepare` and `train` do: read the recipe, plan its stages, run those that are not done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from data_prep.prepare.plan import PrepareSettings
from infra.errors import CheckpointError, SettingsError
from infra.records import EvalReport, EvaluateOutput, PrepareSummary, StageRecord, read_record
from infra.store import Store
from orchestration import running, terminal, workflow
from orchestration.context import cluster_of, context_of, home_of, store_of, tidy
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
    if dry_run:
        plans = workflow.plan(nodes, opened)
        if as_json:
            print_json([{"stage": p.node.name, "state": p.state, "why": p.why, "digest": p.node.digest} for p in plans])
        else:
            terminal.show_plan(plans)
        running.Others(opened, _note).check()
        _check_fit(nodes, opened, cluster.address)
        return
    _check_fit(nodes, opened, cluster.address)
    if all(workflow.is_done(node, opened) for node in nodes):
        with terminal.Screen(quiet=as_json) as screen:
            records = workflow.finished(nodes, opened, _say(screen, opened))
    else:
        tidy(opened, home_of(opened, recipe.name))
        with (
            running.noted(opened, recipe.name, _note),
            terminal.Screen(quiet=as_json) as screen,
            context_of(opened, recipe, cluster, screen) as context,
        ):
            records = workflow.run(nodes, context, _say(screen, opened))
    if as_json:
        print_json({name: record.model_dump(mode="json") for name, record in records.items()})
    else:
        terminal.show_result(records.values(), _reports(opened, records))


def _nodes(recipe: recipes.Recipe, store: Store, until: Literal["prepare", "train"] | None) -> list[workflow.Node]:
    nodes = workflow.graph(recipe, store)
    return nodes if until is None else workflow.only(nodes, until)


def _check_fit(nodes: Sequence[workflow.Node], store: Store, address: str | None, *, anew: bool = False) -> None:
    """Raise, before any work begins, if a stage cannot be trained as set. `anew`: even if the stage is done."""
    todo = [node.name for node in nodes if anew or not workflow.is_done(node, store)]
    doing("looking for encoders")
    try:
        check_training({node.name: node.settings for node in nodes}, todo)
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

    parsed = {name: workflow.parse_stage(name, data)[1] for name, data in recipe.stages.items()}
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
        _check_fit(nodes, store, address, anew=True)
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

"""What `run`, `prepare` and `train` do: read the recipe, look at what is there, do what is missing, tell the end."""

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
        opened.probe()  # before anything else is asked of it: a store that is not there is told of at once
    nodes = _nodes(recipe, opened, until)
    if retry_failed and _retry_failed(recipe, opened, nodes, cluster.address):
        nodes = _nodes(recipe, opened, until)
    if dry_run:
        plans = workflow.plan(nodes, opened)
        if as_json:
            print_json([{"stage": p.node.name, "state": p.state, "why": p.why, "digest": p.node.digest} for p in plans])
        else:
            terminal.show_plan(plans)
        running.Others(opened, _note).look()
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
    """Nothing is built for a stage that cannot be trained as it is set; `anew`: though it may be done by now."""
    todo = [node.name for node in nodes if anew or not workflow.is_done(node, store)]
    doing("looking for encoders")
    try:
        check_training({node.name: node.settings for node in nodes}, todo)
    except CheckpointError as error:
        if address is None:
            raise
        # The cluster's machines load the encoders, and they may reach what this one does not.
        print(f"warning: from this machine, {error}", file=sys.stderr)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _say(screen: terminal.Screen, store: Store) -> workflow.Say:
    """What happened to a stage; where that is the end of a preparation, with what came of it."""

    def say(node: workflow.Node, event: str, text: str) -> None:
        if event in ("finished", "reused") and node.kind.name == "prepare":
            made = read_record(store, node.key, StageRecord).of(PrepareSummary)
            speed = screen.own_per_second(made.inputs) if event == "finished" else 0.0
            text = f"{text}, {terminal.prepared(made, speed)}"
        screen.stage(node, event, text)

    return say


def _retry_failed(recipe: recipes.Recipe, store: Store, nodes: Sequence[workflow.Node], address: str | None) -> bool:
    """Every prepare stage's failed downloads that may come this time become inputs of the run that follows.

    What is refused is refused before any is begun. False if there are none.
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
    found = {name: failed_downloads(store, settings) for name, settings in stages.items()}
    some = any(retry.failed.num_rows for retries in found.values() for retry in retries)
    if some:
        _check_fit(nodes, store, address, anew=True)
    for name, retries in found.items():
        print(f"{name}: {begin_retries(store, retries):,} downloads are tried again", file=sys.stderr)
    return some


def _reports(store: Store, records: dict[str, StageRecord]) -> dict[str, EvalReport]:
    """Each evaluation, under the name of the train stage that it measured."""
    trained = {record.digest_of_work: name for name, record in records.items()}
    return {
        trained.get(record.inputs["checkpoint"], name): read_record(store, record.output.record, EvalReport)
        for name, record in records.items()
        if isinstance(record.output, EvaluateOutput)
    }

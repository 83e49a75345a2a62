"""What the commands do: open the store, the cluster and the tracker, do the work, tell what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from data_prep.prepare.plan import PrepareSettings
from infra import layout
from infra.cluster import ClusterSettings, connect, disconnect
from infra.config import digest, parse
from infra.errors import CheckpointError, DataError, SettingsError
from infra.notices import watched
from infra.records import EvalReport, EvaluateOutput, PrepareSummary, StageRecord, read_record
from infra.store import Store, open_store
from infra.tracking import Tracker, TrackingSettings
from orchestration import leftovers, running, terminal, workflow
from orchestration.patience import doing
from orchestration.terminal import print_json
from pipelines import recipes
from pipelines.stages.base import Context
from pipelines.stages.data import STAGE_URL
from pipelines.stages.fitting import check_training


def run_workflow(
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
    opened = _store(store, recipe.name)
    if retry_failed and dry_run:
        raise SettingsError("a retry is begun in the store", remedy="leave --dry-run out, or --retry-failed")
    if not dry_run:
        opened.probe()  # before anything else is asked of it: a store that is not there is told of at once
    nodes = _nodes(recipe, opened, until)
    if retry_failed and _retry_failed(recipe, opened, nodes, address):
        nodes = _nodes(recipe, opened, until)
    if dry_run:
        plans = workflow.plan(nodes, opened)
        if as_json:
            print_json([{"stage": p.node.name, "state": p.state, "why": p.why, "digest": p.node.digest} for p in plans])
        else:
            terminal.show_plan(plans)
        running.Others(opened, _note).look()
        _check_fit(nodes, opened, address)
        return
    _check_fit(nodes, opened, address)
    if all(workflow.is_done(node, opened) for node in nodes):
        with terminal.Screen(quiet=as_json) as screen:
            records = workflow.finished(nodes, opened, _say(screen, opened))
    else:
        _tidy(opened, _home(opened, recipe.name))
        with (
            running.noted(opened, recipe.name, _note),
            _context(opened, recipe.name, address, quiet=as_json) as (context, screen),
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
    from data_prep.sources import UrlList

    parsed = {name: workflow.parse_stage(name, data)[1] for name, data in recipe.stages.items()}
    stages = {name: settings for name, settings in parsed.items() if isinstance(settings, PrepareSettings)}
    for name, settings in stages.items():
        for source in settings.sources:
            if isinstance(source, UrlList) and source.url.startswith(STAGE_URL):
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


def _tidy(store: Store, home: Path | None = None) -> None:
    if left := str(leftovers.remove(store, home)):
        print(f"removed what killed runs had left: {left}", file=sys.stderr)


def _store(url: str | None, name: str) -> Store:
    return open_store(url or f"runs/{name}")


def _home(store: Store, name: str) -> Path:
    """A folder of this machine for what is no record: the store's own if it is a folder, else one beside the work."""
    local = store.url.removeprefix("file://")
    home = Path(local) if store.url.startswith("file://") else Path("runs") / name
    home.mkdir(parents=True, exist_ok=True)
    return home.absolute()


@contextmanager
def _context(store: Store, name: str, address: str | None, quiet: bool) -> Iterator[tuple[Context, terminal.Screen]]:
    home = _home(store, name)
    settings = TrackingSettings(uri=os.environ.get("MLFLOW_TRACKING_URI") or None)
    uri = settings.uri or f"sqlite:///{home / 'mlflow.db'}"
    with terminal.Screen(quiet=quiet) as screen:
        screen.doing(f"joining the Ray cluster at {address}" if address else "starting Ray")
        connect(ClusterSettings(address=address))
        try:
            screen.doing("opening MLflow")
            artifacts = None if uri.startswith("http") else home / "mlartifacts"  # a server has a place of its own
            with closing(Tracker(uri, settings.experiment, artifacts)) as tracker:
                parent = tracker.run(name, digest([name, store.url]))
                try:
                    with watched():
                        yield Context(store, home, tracker, parent, screen.progress), screen
                except BaseException:
                    parent.end("FAILED")
                    raise
                parent.end()
        finally:
            screen.doing("leaving the Ray cluster" if address else "stopping Ray")
            disconnect()


# ------------------------------------------------------------------------------------------------ checkpoints


def stage_records(store: Store, kind: str) -> list[StageRecord]:
    return [read_record(store, key, StageRecord) for key in layout.STAGE.keys(store, kind=kind)]


def evaluate_folder(
    checkpoint: str, out: str, assignments: Sequence[str], *, address: str | None, as_json: bool
) -> None:
    """A folder is first made into a record in the store named by --out, then scored as a workflow's checkpoint is."""
    from infra.written import override
    from pipelines.evaluation.run import GenevalSettings, geneval
    from training import checkpoint as checkpoints

    settings = parse(GenevalSettings, override({}, assignments))
    opened = open_store(out)
    opened.probe()
    _tidy(opened)
    record = checkpoints.publish_folder(opened, Path(checkpoint))
    with terminal.Screen(quiet=as_json) as screen:
        screen.doing(f"joining the Ray cluster at {address}" if address else "starting Ray")
        connect(ClusterSettings(address=address))
        try:
            stage = digest([record.digest(), settings.chosen()])
            with watched():
                report = geneval(opened, stage, record, settings, screen.count)
        finally:
            disconnect()
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        terminal.show_scores({checkpoint: report})


def make_report(name: str, *, store: str | None, assignments: Sequence[str], out: Path, as_json: bool) -> None:
    from pipelines.page.report import build

    doing("reading the records of the stages")
    recipe = recipes.load(name, assignments)
    opened = _store(store, recipe.name)
    nodes = [node for node in workflow.graph(recipe, opened) if not node.kind.reads_all]
    records = [read_record(opened, node.key, StageRecord) for node in nodes if workflow.is_done(node, opened)]
    if not records:
        raise DataError(f"no stage of `{name}` is done in {opened.url}", remedy=f"run `pixnerd run {name}` first")
    title = next(
        (s["title"] for s in recipe.stages.values() if s.get("kind") == "report" and "title" in s), recipe.name
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(build(opened, title, records), encoding="utf-8")
    if as_json:
        print_json({"page": str(out), "stages": [record.stage for record in records]})
    else:
        print(f"{out}: {len(records)} of {len(nodes)} stages", file=sys.stdout)

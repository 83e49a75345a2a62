"""`pixnerd run`, `prepare`, `train` and `stage` run a workflow or a part of it; `report` writes its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestration.options import (
    DryRunOption,
    JsonOption,
    OnOption,
    RecipeArgument,
    RetryOption,
    SetOption,
    StoreOption,
)

app = typer.Typer()


def _check_recipe(name: str, assignments: list[str] | None) -> None:
    """Report a mistake in the recipe at once: importing what its stages need takes seconds."""
    from pipelines.recipes import load

    load(name, assignments or [])


def _launch(recipe: str, assignments: list[str] | None, **options: Any) -> None:
    _check_recipe(recipe, assignments)
    from orchestration import launch

    launch.run(recipe, assignments=assignments or [], **options)


@app.command(epilog="Example: pixnerd run demo --store s3://my-bucket/pixnerd --set sft.steps=200")
def run(
    workflow: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Run a whole workflow: stages that are done are reused, the others run."""
    _launch(workflow, set_, store=store, address=on, dry_run=dry_run, as_json=json_, retry_failed=retry_failed)


@app.command(epilog="Example: pixnerd prepare demo --store runs/demo")
def prepare(
    config: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    retry_failed: RetryOption = False,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Turn raw image-text pairs into shards: run a recipe's prepare stages and the stages that they need."""
    options = {"address": on, "dry_run": dry_run, "as_json": json_, "retry_failed": retry_failed}
    _launch(config, set_, store=store, until="prepare", **options)


@app.command(epilog="Example: pixnerd train demo --set low.steps=50 --store runs/try")
def train(
    recipe: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
) -> None:
    """Train: run a recipe's train stages and the stages that they need, without evaluation."""
    _launch(recipe, set_, store=store, address=on, dry_run=dry_run, as_json=json_, until="train")


@app.command(epilog="Example: pixnerd stage demo low_data --store s3://my-bucket/pixnerd")
def stage(
    workflow: RecipeArgument,
    name: Annotated[str, typer.Argument(help="The stage's name in the recipe.")],
    store: StoreOption = None,
    set_: SetOption = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Do one stage of a workflow, for engines of others. It may be called again and again, from anywhere.

    Exit codes: 0 done or reused, 1 failed, 2 a setting is wrong, 3 not promoted (a gate is closed), 75 not now (another
    driver has it, or what it needs is missing).
    """
    _check_recipe(workflow, set_)
    from orchestration import launch

    launch.stage(workflow, name, store=store, assignments=set_ or [], address=on, as_json=json_)


@app.command(epilog="Example: pixnerd report demo --out page.html")
def report(
    workflow: RecipeArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
    json_: JsonOption = False,
) -> None:
    """Write the report page of a workflow again, from the records in its store."""
    _check_recipe(workflow, set_)
    from infra.errors import DataError
    from infra.records import StageRecord, read_record
    from orchestration.context import store_of
    from orchestration.patience import doing
    from orchestration.terminal import print_json
    from orchestration.workflow import graph, is_done
    from pipelines import recipes
    from pipelines.page.report import build

    doing("reading the records of the stages")
    recipe = recipes.load(workflow, set_ or [])
    opened = store_of(store, recipe)
    nodes = [node for node in graph(recipe, opened) if not node.kind.reads_all]
    records = [read_record(opened, node.key, StageRecord) for node in nodes if is_done(node, opened)]
    if not records:
        raise DataError(
            f"no stage of `{workflow}` is done in {opened.url}", remedy=f"run `pixnerd run {workflow}` first"
        )
    title = next(
        (s["title"] for s in recipe.stages.values() if s.get("kind") == "report" and "title" in s), recipe.name
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(build(opened, title, records), encoding="utf-8")
    if json_:
        print_json({"page": str(out), "stages": [record.stage for record in records]})
    else:
        print(f"{out}: {len(records)} of {len(nodes)} stages")

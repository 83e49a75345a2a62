"""`pixnerd sweep`: which sampling settings suit a checkpoint."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.errors import SettingsError
from orchestration.options import JsonOption, OnOption

if TYPE_CHECKING:
    from infra.records import CheckpointRecord
    from infra.store import Store
    from pipelines.evaluation.sweep import Sweep

app = typer.Typer()


@app.command(epilog="Example: pixnerd sweep sft --store runs/demo --set guidance=[1,2,4] --set steps=[8,16]")
def sweep(
    checkpoint: Annotated[str, typer.Argument(help="A train stage of --store, or a checkpoint's folder.")],
    store: Annotated[
        str, typer.Option("--store", help="The workflow's store; of a folder, where pictures and verdicts go.")
    ],
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a chart of all points to this PNG.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set guidance=[2,4]; may be repeated.")
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Score every combination of `guidance`, `steps`, `solver` and `decay`, and choose one by a rule set before.

    `rule` is `best`, or `cheapest` of those that no interval tells from the best. The prompts are not the test's: a
    choice made on these fits them. `decay` makes other averages of the weights, out of those that the training kept.
    """
    from infra.cluster import ClusterSettings
    from infra.config import parse
    from infra.notices import watched
    from infra.store import open_store
    from infra.yaml_settings import override
    from orchestration import terminal
    from orchestration.context import joined, tidy
    from pipelines.evaluation.sweep import SweepSettings
    from pipelines.evaluation.sweep import sweep as walk
    from pipelines.pictures.sweep import draw

    settings = parse(SweepSettings, override({}, set_ or []))
    opened = open_store(store)
    opened.probe()
    tidy(opened)
    with terminal.Screen(quiet=json_) as screen, joined(screen, ClusterSettings(address=on)), watched():
        found = walk(opened, _checkpoints(opened, checkpoint, settings.decay), settings, screen.count)
    if plot is not None:
        draw(found, plot)
    if json_:
        terminal.print_json(found.model_dump(mode="json"))
    else:
        _show(found, plot)


def _checkpoints(store: Store, name: str, decays: list[float]) -> dict[float | None, CheckpointRecord]:
    from infra.records import CheckpointRecord, read_record
    from orchestration.artifacts import checkpoint_key, network_home
    from training import checkpoint as checkpoints
    from training import posthoc

    if (Path(name) / "config.json").is_file():
        if decays:
            raise SettingsError(
                "other averages are made out of those that a training kept, and a folder has none",
                remedy="name the train stage and its --store",
            )
        return {None: checkpoints.publish_folder(store, Path(name))}
    if not decays:
        return {None: read_record(store, checkpoint_key(store, name), CheckpointRecord)}
    made: dict[float | None, CheckpointRecord] = {}
    with ExitStack() as stack:
        for decay in decays:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pixnerd-ema-"))) / "checkpoint"
            posthoc.make(store, network_home(store, name), folder, decay=decay, sigma_rel=None, step=None)
            made[decay] = checkpoints.publish_folder(store, folder)
    return made


def _show(found: Sweep, plot: Path | None) -> None:
    from orchestration.terminal import table
    from pipelines.evaluation.statistics import ends
    from pipelines.pictures.sweep import named

    rows = []
    for number, scored in enumerate(found.points):
        score = scored.scores["geneval/overall"]
        mark = "*" if number == found.best else ""
        cells = [f"{scored.point.guidance:g}", f"{scored.point.evaluations:,}", f"{score.value:.3f} {ends(score)}"]
        rows.append([f"{named(scored)} {mark}", *cells, f"{scored.failed:,}"])
    table(["", "guidance", "evaluations a picture", "geneval/overall", "failed"], rows)
    print(f"*: chosen by the rule `{found.rule}`, on the prompts `{found.prompt_set}`")
    if plot is not None:
        print(f"chart: {plot}")

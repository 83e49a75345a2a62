"""`pixnerd evaluate`: score a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import SettingsError
from orchestration.commands import evaluate_dpg, evaluate_fid
from orchestration.options import JsonOption, OnOption

app = typer.Typer(no_args_is_help=True, help="Score a checkpoint.", rich_markup_mode=None)
app.command(epilog="Example: pixnerd evaluate dpg --questions questions.csv --answers answers.jsonl --mode compat")(
    evaluate_dpg.dpg
)
app.command(epilog="Example: pixnerd evaluate fid --features real.npz generated.npz --json")(evaluate_fid.fid)


@app.command(epilog="Example: pixnerd evaluate geneval champion --out scores")
def geneval(
    checkpoint: Annotated[str | None, typer.Argument(help="A checkpoint's folder.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder or store URL for pictures, verdicts and the report.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Judge the pictures of this folder instead: 00000/samples/0000.png and so on."),
    ] = None,
    detections: Annotated[
        Path | None,
        typer.Option("--detections", help="Score what a judge has seen: a JSONL or Parquet file, without pictures."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="A JSONL file of GenEval metadata, `official`, or `rephrased`.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Write pictures and results.jsonl to this folder, as GenEval's scripts read them."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set images=8; may be repeated.")
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Draw GenEval's prompts and score the pictures: six tasks, with 95 % intervals from a bootstrap over prompts.

    Pictures of other models are scored with --images, and the official scripts score ours after --export.

    GenEval's own judge of real pictures: --set judge.kind=mask2former --set judge.weights=FILE --set prompts=official.

    A file for --detections has a row for each detection: `item` (the number of the prompt, from 0), `image` (that of
    its picture, from 0), `class`, `score`, `box` ([left, top, right, bottom] in pixels) and `color` (null where it is
    not known). As JSONL: {"item": 0, "image": 0, "class": "bench", "score": 0.9, "box": [3, 4, 90, 80], "color": null}.
    A picture without detections has one row without a class, or none. There are as many pictures of each prompt as
    the highest `image` tells, or as --set images=N.
    """
    from infra.yaml_settings import override

    if sum(given is not None for given in (checkpoint, images, detections)) != 1:
        raise SettingsError(
            "name a checkpoint, a folder of pictures with --images, or a file with --detections", remedy="one of them"
        )
    settings = override({} if prompts is None else {"prompts": prompts}, set_ or [])
    if detections is not None:
        _of_detections(detections, settings, json_)
    elif out is None:
        raise SettingsError("there is no place for pictures and verdicts", remedy="name a folder with --out")
    else:
        _of_pictures(checkpoint, images, out, export, settings, on, json_)


def _of_pictures(
    checkpoint: str | None,
    images: Path | None,
    out: str,
    export: Path | None,
    changes: dict[str, Any],
    on: str | None,
    json_: bool,
) -> None:
    from infra.cluster import ClusterSettings
    from infra.config import parse
    from infra.notices import watched
    from infra.store import open_store
    from orchestration import terminal
    from orchestration.context import joined, tidy
    from pipelines.evaluation import folders, run
    from pipelines.evaluation.sets import read_prompts
    from training.checkpoint import publish_folder

    settings = parse(run.GenevalSettings, changes)
    opened = open_store(out)
    opened.probe()
    tidy(opened)
    with terminal.Screen(quiet=json_) as screen, joined(screen, ClusterSettings(address=on)), watched():
        if images is not None:
            report = run.geneval_of_folder(opened, images, settings, screen.count)
        else:
            # It is published as a record in the store at --out, so that it is scored as a workflow's checkpoint is.
            record = publish_folder(opened, Path(str(checkpoint)))
            report = run.geneval(opened, run.stage_of(record.digest(), settings), record, settings, screen.count)
    if export is not None:
        folders.laid_out(opened, report, read_prompts(settings), export)
    if json_:
        terminal.print_json(report.model_dump(mode="json"))
    else:
        terminal.show_scores({str(checkpoint or images): report})


def _of_detections(file: Path, changes: dict[str, Any], json_: bool) -> None:
    """Scores from what was seen alone: neither Ray nor a network is needed."""
    from infra.config import parse
    from orchestration import terminal
    from pipelines.evaluation import detections

    found = detections.summary(detections.read(file), parse(detections.ScoringSettings, changes))
    if json_:
        terminal.print_json(found.shown())
    else:
        terminal.show_intervals({file.name: found.scores})

"""`pixnerd evaluate`: score a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    out: Annotated[str, typer.Option("--out", help="Folder or store URL for pictures, verdicts and the report.")],
    checkpoint: Annotated[str | None, typer.Argument(help="A checkpoint's folder.")] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Judge the pictures of this folder instead: 00000/samples/0000.png and so on."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the pictures to this folder, as GenEval's scripts read them.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set images=8; may be repeated.")
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Draw GenEval's prompts and score the pictures: six tasks, with 95 % intervals from a bootstrap over prompts.

    Pictures of other models are scored with --images, and the official scripts score ours after --export.
    """
    from infra.cluster import ClusterSettings
    from infra.config import digest, parse
    from infra.notices import watched
    from infra.store import open_store
    from infra.yaml_settings import override
    from orchestration import terminal
    from orchestration.context import joined, tidy
    from pipelines.evaluation import folders
    from pipelines.evaluation.run import GenevalSettings, geneval_of_folder, read_prompts
    from pipelines.evaluation.run import geneval as score
    from training.checkpoint import publish_folder

    if (checkpoint is None) == (images is None):
        raise SettingsError("name a checkpoint, or a folder of pictures with --images", remedy="either, but not both")
    settings = parse(GenevalSettings, override({}, set_ or []))
    opened = open_store(out)
    opened.probe()
    tidy(opened)
    with terminal.Screen(quiet=json_) as screen, joined(screen, ClusterSettings(address=on)), watched():
        if images is not None:
            report = geneval_of_folder(opened, images, settings, screen.count)
        else:
            # It is published as a record in the store at --out, so that it is scored as a workflow's checkpoint is.
            record = publish_folder(opened, Path(str(checkpoint)))
            report = score(opened, digest([record.digest(), settings.chosen()]), record, settings, screen.count)
    if export is not None:
        folders.laid_out(opened, report, read_prompts(settings), export)
    if json_:
        terminal.print_json(report.model_dump(mode="json"))
    else:
        terminal.show_scores({str(checkpoint or images): report})

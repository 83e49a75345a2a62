"""`pixnerd evaluate`: score a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestration.options import JsonOption, OnOption

app = typer.Typer(no_args_is_help=True, help="Score a checkpoint.", rich_markup_mode=None)


@app.command(epilog="Example: pixnerd evaluate geneval champion --out scores")
def geneval(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[str, typer.Option("--out", help="Folder or store URL for pictures, verdicts and the report.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set images=8; may be repeated.")
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Draw GenEval's prompts and score the pictures: six tasks, with 95 % intervals from a bootstrap over prompts."""
    from infra.cluster import ClusterSettings
    from infra.config import digest, parse
    from infra.notices import watched
    from infra.store import open_store
    from infra.yaml_settings import override
    from orchestration import terminal
    from orchestration.context import joined, tidy
    from pipelines.evaluation.run import GenevalSettings
    from pipelines.evaluation.run import geneval as score
    from training.checkpoint import publish_folder

    settings = parse(GenevalSettings, override({}, set_ or []))
    opened = open_store(out)
    opened.probe()
    tidy(opened)
    # The folder is published as a record in the store at --out, so that it is scored as a workflow's checkpoint is.
    record = publish_folder(opened, Path(checkpoint))
    with terminal.Screen(quiet=json_) as screen, joined(screen, ClusterSettings(address=on)), watched():
        report = score(opened, digest([record.digest(), settings.chosen()]), record, settings, screen.count)
    if json_:
        terminal.print_json(report.model_dump(mode="json"))
    else:
        terminal.show_scores({checkpoint: report})

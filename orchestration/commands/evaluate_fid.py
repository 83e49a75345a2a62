"""`pixnerd evaluate fid`: a checkpoint, a folder of pictures, or features that were kept, against real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.errors import SettingsError
from orchestration.options import JsonOption, OnOption


def fid(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint's folder. With --features: the generated ones."),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Score features alone: --features real.npz generated.npz, arrays `features`."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder or store URL for pictures, features and the report.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Score the pictures of this folder instead of a checkpoint's.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting, e.g. --set reference=real.npz; may be repeated."),
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Compare pictures with real ones: FID, sFID, KID, precision, recall and the Inception Score.

    Real pictures are an npz of ADM's evaluations or a folder, --set reference=PATH; the network's weights are
    --set inception=FILE. A checkpoint that draws from labels draws all of them in turn; one that draws from text needs
    captions, and so is scored by a `fid` stage of a workflow.
    """
    given = more or []
    if features is not None:
        if len(given) != 1 or out or images or set_ or on:
            raise SettingsError(
                "--features compares two files, and needs nothing else",
                remedy="pixnerd evaluate fid --features real.npz generated.npz",
            )
        _of_features(features, Path(given[0]), json_)
        return
    if out is None or (len(given) == 1) == (images is not None) or len(given) > 1:
        raise SettingsError("name a checkpoint, or a folder of pictures with --images, and --out", remedy="not both")
    _of_pictures(out, given[0] if given else None, images, set_ or [], on, json_)


def _of_features(real: Path, made: Path, json_: bool) -> None:
    """Needs neither Ray nor a network."""
    from orchestration import terminal
    from pipelines.evaluation.fid import of_features, read_features

    found = of_features(*read_features((real, made)))
    if json_:
        terminal.print_json(found)
    else:
        terminal.table(["", "score"], [[name, f"{value:.6f}"] for name, value in found.items()])


def _of_pictures(
    out: str, checkpoint: str | None, images: Path | None, changes: list[str], on: str | None, json_: bool
) -> None:
    from infra.cluster import ClusterSettings
    from infra.config import digest, parse
    from infra.notices import watched
    from infra.store import open_store
    from infra.yaml_settings import override
    from orchestration import terminal
    from orchestration.context import joined, tidy
    from pipelines.evaluation import fid_run
    from pipelines.stages.fid import classes_of
    from training.checkpoint import publish_folder

    settings = parse(fid_run.FidSettings, override({}, changes))
    real = fid_run.Real(settings, None)
    real.identity()  # what is missing is told before anything is drawn
    opened = open_store(out)
    opened.probe()
    tidy(opened)
    with terminal.Screen(quiet=json_) as screen, joined(screen, ClusterSettings(address=on)), watched():
        if images is not None:
            report = fid_run.fid_of_folder(opened, images, real, screen.count)
        else:
            record = publish_folder(opened, Path(str(checkpoint)))
            prompts = fid_run.prompts_of(opened, None, classes_of(opened, record), settings)
            stage = digest([record.digest(), real.identity(), settings.chosen()])
            report = fid_run.fid(opened, stage, record, prompts, real, screen.count)
    if json_:
        terminal.print_json(report.model_dump(mode="json"))
    else:
        terminal.show_scores({str(checkpoint or images): report})
        print(f"judge: {report.judge}; {report.failed:,} failed")

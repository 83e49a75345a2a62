"""`pixnerd evaluate dpg`: score a checkpoint, a folder of pictures, or answers that were kept, by DPG-Bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.errors import SettingsError
from orchestration.options import JsonOption, OnOption

if TYPE_CHECKING:
    from pipelines.evaluation.dpg import Mode, Scores

MODES = ("compat", "fixed")


def dpg(
    checkpoint: Annotated[str | None, typer.Argument(help="A checkpoint's folder.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder or store URL for pictures, answers and the report.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Judge the 2 x 2 grids of this folder instead, ITEM.png; needs --resolution."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Pixels a side of each picture in a grid of --images.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the pictures to this folder, as the published script reads.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option("--questions", help="A CSV file in DPG-Bench's form. [default: the shape world's]")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            help='Score these answers alone, lines such as {"item": "dog", "crop": 0, "question": 3, "answer": "yes"}; '
            "null: the judge raised; or a report's table of them, FILE.parquet.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="compat: with the published script's faults; fixed: without. [default: fixed]"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting, e.g. --set judge.kind=vlm; may be repeated.")
    ] = None,
    on: OnOption = None,
    json_: JsonOption = False,
) -> None:
    """Score by DPG-Bench: draw its prompts, ask a judge about the pictures, and count what it answers with yes.

    All scores are in percent, as the published script prints them, those of single items too. Where an answer is
    missing, compat leaves the item out, as that script does, and fixed counts it as wrong; the coverage tells how many.
    """
    if answers is not None:
        _of_answers(questions, answers, mode, json_, others=(checkpoint, out, images, resolution, export, set_, on))
        return
    if out is None or (checkpoint is None) == (images is None):
        raise SettingsError(
            "name a checkpoint, or a folder of pictures with --images, and --out",
            remedy="either, but not both; answers that were kept are scored by --questions and --answers alone",
        )
    if (images is None) != (resolution is None):
        raise SettingsError("--images and --resolution go together", remedy="say how large each picture of a grid is")
    named = [f"{name}={value}" for name, value in (("questions", questions), ("mode", _mode(mode))) if value]
    _of_pictures(out, checkpoint, images, resolution or 0, export, [*(set_ or []), *named], on, json_)


def _mode(mode: str | None) -> Mode | None:
    if mode is not None and mode not in MODES:
        raise SettingsError(f"`{mode[:20]}` is no mode of scoring", remedy="write --mode compat or --mode fixed")
    return "compat" if mode == "compat" else "fixed" if mode == "fixed" else None


def _of_answers(
    questions: str | None, answers: Path, mode: str | None, json_: bool, others: tuple[object, ...]
) -> None:
    """Needs neither Ray nor a network."""
    from pipelines.evaluation.dpg import read_answers, read_questions, score

    if any(other is not None and other != [] for other in others) or questions is None:
        raise SettingsError(
            "--answers scores what was kept, with --questions, and needs nothing else",
            remedy="pixnerd evaluate dpg --questions questions.csv --answers answers.jsonl --mode fixed",
        )
    asked = read_questions(Path(questions))
    if answers.suffix == ".parquet":
        from pipelines.evaluation import asking

        kept = asking.read_answers(answers)
    else:
        kept = read_answers(answers, asked)
    _print(score(asked, kept, _mode(mode) or "fixed"), json_)


def _of_pictures(
    out: str,
    checkpoint: str | None,
    images: Path | None,
    resolution: int,
    export: Path | None,
    changes: list[str],
    on: str | None,
    json_: bool,
) -> None:
    from infra.cluster import ClusterSettings
    from infra.config import digest, parse
    from infra.notices import watched
    from infra.store import open_store
    from infra.yaml_settings import override
    from orchestration import terminal
    from orchestration.context import joined, tidy
    from pipelines.evaluation import dpg_run
    from pipelines.evaluation.grids import laid_out
    from training.checkpoint import publish_folder

    settings = parse(dpg_run.DpgSettings, override({}, changes))
    asked = dpg_run.questions_of(settings)
    opened = open_store(out)
    opened.probe()
    tidy(opened)
    with terminal.Screen(quiet=json_) as screen, joined(screen, ClusterSettings(address=on)), watched():
        if images is not None:
            report = dpg_run.dpg_of_folder(opened, images, resolution, settings, screen.count)
        else:
            # It is published as a record in the store at --out, so that it is scored as a workflow's checkpoint is.
            record = publish_folder(opened, Path(str(checkpoint)))
            stage = digest([record.digest(), dpg_run.outside(settings), dpg_run.counted(settings)])
            report = dpg_run.dpg(opened, stage, record, settings, screen.count)
    if export is not None:
        items = [item.name for item in dpg_run.items_of(settings)]
        laid_out(opened, report, items, settings.images, export)
    scores = dpg_run.kept_scores(opened, report, asked, settings.mode)
    if json_:
        terminal.print_json({**report.model_dump(mode="json"), **scores.plain()})
    else:
        terminal.show_scores({str(checkpoint or images): report})
        print(f"judge: {report.judge}; questions: {dpg_run.questions_name(settings)}")
        _print_coverage(scores)


def _print(scores: Scores, json_: bool) -> None:
    from orchestration import terminal

    if json_:
        terminal.print_json(scores.plain())
        return
    rows = [*scores.l1.items(), *((f"  {name}", value) for name, value in scores.l2.items())]
    overall = "no item has a score" if scores.overall is None else f"{scores.overall:.2f}"
    terminal.table(["", "percent"], [*([name, f"{value:.2f}"] for name, value in rows), ["overall", overall]])
    _print_coverage(scores)


def _print_coverage(scores: Scores) -> None:
    told = scores.coverage
    print(f"{told.items:,} items: {told.scored:,} scored, {told.failed:,} failed, {told.missing:,} missing")
    for item, why in list(scores.failures.items())[:10]:
        print(f"  {item}: {why}")

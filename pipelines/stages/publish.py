"""Stages that publish: a version in the model registry, and the report page."""

from __future__ import annotations

from typing import Annotated

from infra import layout
from infra.config import Settings, spelt
from infra.records import EvaluateOutput, GateOutput, Output, RegisterOutput, ReportOutput, put_data
from pipelines.stages.base import Context, Inputs, StageKind, report_of, stage_reference
from pipelines.stages.tracked import log_scores, model_of


class RegisterStage(Settings):
    gate: str = stage_reference()
    checkpoint: str = stage_reference()
    scores: str = stage_reference()
    model: Annotated[str, spelt(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}", "letters, digits, blanks, `.`, `_` and `-`")] = (
        "pixnerd"
    )
    alias: Annotated[
        str, spelt(r"(?!(latest|v\d+)$)[A-Za-z0-9_-]{1,99}", "letters, digits, `_` and `-`, neither latest nor v1")
    ] = "champion"


def register(context: Context, settings: RegisterStage, inputs: Inputs) -> Output:
    """The checkpoint as a version of a registered model in MLflow; its weights stay in the store.

    It runs only where its gate is open: see `orchestration.workflow`.
    """
    verdict = inputs["gate"].of(GateOutput)
    assert verdict.passed, "a stage behind a closed gate does not run"
    context.check_held()
    model, report = model_of(context, inputs["checkpoint"]), report_of(context.store, inputs["scores"])
    log_scores(context, inputs["checkpoint"], report)
    passed = [f"{rule.score} {rule.value:.3f} is {rule.limit}" for rule in verdict.verdicts]
    about = f"{inputs['checkpoint'].stage}: {'; '.join(passed)}. Judged by {report.judge}."
    context.check_held()
    version = context.tracker.register(settings.model, settings.alias, context.run, model, about)
    return RegisterOutput(model=settings.model, version=version, alias=settings.alias, source=model.source)


class ReportStage(Settings):
    title: str = "PixNerd"


def report(context: Context, settings: ReportStage, inputs: Inputs) -> Output:
    """One self-contained HTML page about the whole workflow: its data, training, scores and pictures."""
    from pipelines.page.report import build

    page = build(context.store, settings.title, list(inputs.values()))
    data = put_data(context.store, layout.PAGES.at(), "report.html", page.encode())
    path = context.home / "report.html"
    path.write_text(page, encoding="utf-8")
    context.parent.artifact(path)
    return ReportOutput(page=data, path=str(path.absolute()))


KINDS = (
    StageKind(
        "register",
        RegisterStage,
        register,
        takes={"gate": "gate", "checkpoint": "train", "scores": EvaluateOutput.kinds()},
    ),
    StageKind("report", ReportStage, report, reads_all=True),
)

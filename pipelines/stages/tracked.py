"""What evaluations tell MLflow, whichever protocol they follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infra.records import EvalReport, StageRecord, TrainOutput
from infra.store import Store
from infra.tracking import Measured, Model
from pipelines.evaluation.judging import verdict_rows
from pipelines.evaluation.tars import read_pictures
from pipelines.stages.base import Context, checkpoint_of

_SHOWN = 100  # pictures in MLflow's table, each the first of its prompt; all of them are in the store
_COLUMNS = {"task": "task", "text": "prompt", "correct": "correct", "reasons": "reasons"}

Metric = Callable[[str, str], str]  # a score's name and the judge's -> what MLflow calls it


def _own_name(score: str, judge: str) -> str:
    return score


def model_of(context: Context, trained: StageRecord) -> Model:
    """The checkpoint of a train stage, as MLflow lists it."""
    record = checkpoint_of(context.store, trained)
    source = f"{context.store.url}/{trained.of(TrainOutput).record}"
    return Model(f"{trained.stage}-{record.step}", record.digest(), source, record.snapshot)


def log_scores(
    context: Context, trained: StageRecord, report: EvalReport, metric: Metric = _own_name
) -> dict[str, float]:
    """Log scores to the stage's run and to the checkpoint's model, with the prompts that they are on."""
    scores = {metric(name, report.judge): score.value for name, score in report.scores.items()}
    on = Measured(f"{report.protocol}-prompts", report.prompts)
    context.run.scores(model_of(context, trained), on, scores, checkpoint_of(context.store, trained).step)
    return scores


def log_report(context: Context, trained: StageRecord, report: EvalReport, metric: Metric = _own_name) -> None:
    """Log all that an evaluation found, its scores to the workflow's run as well."""
    scores = log_scores(context, trained, report, metric)
    told = {"checkpoint": report.checkpoint, "judge": report.judge, "prompts": report.prompt_set or report.prompts}
    context.run.tags({f"pixnerd.{name}": value for name, value in told.items()})
    context.parent.metrics({f"{trained.stage}/{name}": value for name, value in scores.items()}, 0)
    context.run.table("verdicts.json", _verdicts(context.store, report))


def _verdicts(store: Store, report: EvalReport) -> dict[str, list[Any]]:
    rows = [row for row in verdict_rows(store, report.details) if row["image"] == 0][:_SHOWN]
    pictures: dict[int, bytes] = {}
    for tar in report.pictures:
        if len(pictures) >= len(rows):
            break
        pictures |= {prompt: png for (prompt, image), png in read_pictures(store, [tar]).items() if image == 0}
    columns = {shown: [row[name] for row in rows] for name, shown in _COLUMNS.items()}
    return {**columns, "picture": [pictures.get(row["prompt"], "not drawn") for row in rows]}

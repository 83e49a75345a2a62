"""Stages that measure a checkpoint: sample pictures, GenEval scores, and a gate that the scores must pass."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator

from infra import layout
from infra.config import Settings
from infra.errors import SettingsError
from infra.problems import Wrong, did_you_mean
from infra.records import EvalReport, EvaluateOutput, GateOutput, Output, SampleOutput, Verdict
from pipelines.evaluation.prompts import TASKS
from pipelines.evaluation.run import GenevalSettings, prompts_digest
from pipelines.sample import held_out
from pipelines.sample.held_out import DrawSettings
from pipelines.stages.base import (
    Below,
    Context,
    Inputs,
    StageKind,
    checkpoint_of,
    report_of,
    snapshot_of,
    stage_reference,
)
from pipelines.stages.tracked import log_report


class SampleStage(DrawSettings):
    checkpoint: str = stage_reference()
    data: str = stage_reference()


def sample(context: Context, settings: SampleStage, inputs: Inputs) -> Output:
    """A checkpoint -> pictures for captions that training never saw, on the page and on a contact sheet."""
    checkpoint, data = checkpoint_of(context.store, inputs["checkpoint"]), snapshot_of(context.store, inputs["data"])
    drawn = held_out.draw(context.store, context.digest, checkpoint, data, settings, context.progress)
    path = context.home / f"{context.stage}.png"
    held_out.write_sheet(context.store, drawn, f"{inputs['checkpoint'].stage}, step {checkpoint.step:,}", path)
    context.run.artifact(path)
    record = layout.SAMPLES.at(stage=context.digest)
    return SampleOutput(record=record, sheet=str(path.absolute()), prompts=len(drawn.prompts))


class EvaluateStage(GenevalSettings):
    checkpoint: str = stage_reference()


def evaluate(context: Context, settings: EvaluateStage, inputs: Inputs) -> Output:
    """A checkpoint -> GenEval's six tasks with intervals."""
    from pipelines.evaluation.run import geneval

    checkpoint = checkpoint_of(context.store, inputs["checkpoint"])
    report = geneval(context.store, context.digest, checkpoint, settings, context.progress)
    scores = log_report(context, inputs["checkpoint"], report)
    return EvaluateOutput(record=layout.REPORT.at(stage=context.digest), scores=scores)


class Rule(Settings):
    """A score must reach a value, or beat another stage's, or both."""

    score: str = "geneval/overall"
    at_least: float | None = None
    above: str | None = Field(None, description="the stage of `scores` that must be beaten")

    @model_validator(mode="after")
    def _judges_something(self) -> Rule:
        if self.at_least is None and self.above is None:
            raise ValueError("a rule needs `at_least` or `above`")
        return self


class GateStage(Settings):
    # A rule judges the first that has its score; the others are there to be compared with.
    scores: list[str] = stage_reference()
    rules: list[Rule] = Field(min_length=1)


def check_gate(settings: GateStage, below: Below) -> Iterator[Wrong]:
    scores = [*(f"geneval/{name}" for name in (*TASKS, "overall")), "dpg/overall"]
    for number, rule in enumerate(settings.rules):
        if rule.above is not None and rule.above not in settings.scores:
            remedy = did_you_mean(rule.above, settings.scores, f"name one of {', '.join(settings.scores)}")
            message = f"names `{rule.above}`, which is not among the gate's scores"
            yield Wrong(f"rules.{number}.above", message, remedy)
        if rule.score not in scores and not rule.score.startswith("dpg/"):  # whose categories the questions name
            remedy = did_you_mean(rule.score, scores, f"known: {', '.join(scores)}")
            yield Wrong(f"rules.{number}.score", f"is {rule.score}, which no evaluation has", remedy)


def gate(context: Context, settings: GateStage, inputs: Inputs) -> Output:
    """Is the model good enough to be registered? The verdict is recorded either way."""
    reports = {
        name: report_of(context.store, inputs[f"scores.{number}"]) for number, name in enumerate(settings.scores)
    }
    verdicts = []
    for rule in settings.rules:
        having = (report for report in reports.values() if rule.score in report.scores)
        value = _score(next(having, reports[settings.scores[0]]), rule.score)
        if rule.at_least is not None:
            limit, passed = f"at least {rule.at_least:.3f}", value >= rule.at_least
            verdicts.append(Verdict(score=rule.score, value=value, limit=limit, passed=passed))
        if rule.above is not None:
            other = _score(reports[rule.above], rule.score)
            limit, passed = f"above {rule.above}'s {other:.3f}", value > other
            verdicts.append(Verdict(score=rule.score, value=value, limit=limit, passed=passed))
    passed = all(verdict.passed for verdict in verdicts)
    context.run.tags({"pixnerd.gate": "passed" if passed else "failed"})
    return GateOutput(passed=passed, verdicts=verdicts)


def _score(report: EvalReport, name: str) -> float:
    if name not in report.scores:
        raise SettingsError(f"the evaluation has no score `{name}`", remedy=f"it has {', '.join(report.scores)}")
    return report.scores[name].value


KINDS = (
    StageKind("sample", SampleStage, sample, takes={"checkpoint": "train", "data": "snapshot"}, format=2),
    StageKind(
        "evaluate",
        EvaluateStage,
        evaluate,
        outside=lambda settings, store, inputs: prompts_digest(settings),
        takes={"checkpoint": "train"},
        format=2,  # in 1 the pictures of several prompts were drawn in other batches, and their size did not count
    ),
    StageKind("gate", GateStage, gate, check=check_gate, takes={"scores": ("evaluate", "dpg")}),
)

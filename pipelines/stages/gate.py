"""The gate that a model's scores must pass before it is registered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from infra import layout
from infra.config import Settings
from infra.errors import EvaluationError, SettingsError
from infra.problems import Wrong, did_you_mean
from infra.records import EvalReport, EvaluateOutput, GateOutput, Output, StageRecord, Verdict, read_record
from infra.store import Store
from pipelines.evaluation.compare import Side, compared, may_be_compared
from pipelines.evaluation.prompts import TASKS
from pipelines.stages.base import Below, Context, Inputs, StageKind, report_of, stage_reference

LOWER_IS_BETTER = {"fid", "sfid", "kid"}  # scores that are distances from real pictures


class Rule(Settings):
    """A score must reach a value, or beat another evaluation's, or both."""

    score: str = "geneval/overall"
    at_least: float | None = None
    at_most: float | None = None
    above: str | None = Field(
        None, description="what must be beaten: a stage of `scores`, or an alias of `model` such as champion"
    )
    by: Literal["value", "interval"] = Field(
        "value", description="interval: the 95 % interval of the paired difference must lie on the better side of zero"
    )

    @model_validator(mode="after")
    def _judges_something(self) -> Rule:
        if self.at_least is None and self.at_most is None and self.above is None:
            raise ValueError("a rule needs `at_least`, `at_most` or `above`")
        if self.by == "interval" and self.above is None:
            raise ValueError("`by: interval` needs `above`, which names what the score is compared with")
        return self


class GateStage(Settings):
    # A rule judges the first that has its score; the others are there to be compared with.
    scores: list[str] = stage_reference()
    rules: list[Rule] = Field(min_length=1)
    model: str | None = Field(None, description="the registered model whose aliases rules may name")


def check_gate(settings: GateStage, below: Below) -> Iterator[Wrong]:
    scores = [*(f"geneval/{name}" for name in (*TASKS, "overall")), "dpg/overall", "fid/fid"]
    for number, rule in enumerate(settings.rules):
        if rule.above is not None and rule.above not in settings.scores and settings.model is None:
            remedy = did_you_mean(rule.above, settings.scores, f"name one of {', '.join(settings.scores)}")
            message = f"names `{rule.above}`, which is not among the gate's scores, and the gate names no `model`"
            yield Wrong(f"rules.{number}.above", message, remedy)
        if rule.score not in scores and not rule.score.startswith(("dpg/", "fid/")):  # whose names files may tell
            remedy = did_you_mean(rule.score, scores, f"known: {', '.join(scores)}")
            yield Wrong(f"rules.{number}.score", f"is {rule.score}, which no evaluation has", remedy)
        if rule.by == "interval" and rule.score.startswith("fid/"):
            message = "asks for a paired difference, which a score of all pictures together does not have"
            yield Wrong(f"rules.{number}.by", message, "compare by value")


class _Other(NamedTuple):
    """What a score must beat."""

    name: str
    report: EvalReport


def gate(context: Context, settings: GateStage, inputs: Inputs) -> Output:
    """Is the model good enough to be registered? The verdict is recorded either way."""
    reports = {
        name: report_of(context.store, inputs[f"scores.{number}"]) for number, name in enumerate(settings.scores)
    }
    verdicts = [verdict for rule in settings.rules for verdict in _verdicts(context, settings, rule, reports)]
    passed = all(verdict.passed for verdict in verdicts)
    context.run.tags({"pixnerd.gate": "passed" if passed else "failed"})
    return GateOutput(passed=passed, verdicts=verdicts)


def _verdicts(
    context: Context, settings: GateStage, rule: Rule, reports: Mapping[str, EvalReport]
) -> Iterator[Verdict]:
    having = (report for report in reports.values() if rule.score in report.scores)
    judged = next(having, reports[settings.scores[0]])
    value = _score(judged, rule.score)
    if rule.at_least is not None:
        yield Verdict(
            score=rule.score, value=value, limit=f"at least {rule.at_least:.3f}", passed=value >= rule.at_least
        )
    if rule.at_most is not None:
        yield Verdict(score=rule.score, value=value, limit=f"at most {rule.at_most:.3f}", passed=value <= rule.at_most)
    if rule.above is None:
        return
    if rule.above in reports:
        other: _Other | None = _Other(rule.above, reports[rule.above])
    else:
        assert settings.model is not None, "the check of the settings holds it"
        other = _holder(context, settings.model, rule.above, judged)
    if other is None:  # the first model of this name
        limit = f"beyond {settings.model}'s {rule.above}, of which there is none yet"
        yield Verdict(score=rule.score, value=value, limit=limit, passed=True)
    else:
        yield _beaten(context.store, rule, judged, other)


def _beaten(store: Store, rule: Rule, judged: EvalReport, other: _Other) -> Verdict:
    value, theirs = _score(judged, rule.score), _score(other.report, rule.score)
    lower = rule.score.rpartition("/")[2] in LOWER_IS_BETTER
    limit = f"{'below' if lower else 'above'} {other.name}'s {theirs:.3f}"
    if rule.by == "value":
        return Verdict(score=rule.score, value=value, limit=limit, passed=value < theirs if lower else value > theirs)
    found = compared(Side("the judged evaluation", store, judged), Side(other.name, store, other.report))
    name = rule.score.partition("/")[2]
    if name not in found:
        raise EvaluationError(
            f"`{rule.score}` has no paired difference", remedy=f"compare one of {', '.join(found)}, or by value"
        )
    interval = found[name].difference.interval
    if interval.low is None:
        limit = f"{limit}, of whose difference no interval is known, as the prompts are too few"
        return Verdict(score=rule.score, value=value, limit=limit, passed=False)
    limit = f"{limit} by [{interval.low:+.3f}, {interval.high:+.3f}]"
    return Verdict(score=rule.score, value=value, limit=limit, passed=interval.low > 0)


def _holder(context: Context, model: str, alias: str, judged: EvalReport) -> _Other | None:
    """The evaluation of the version that has the alias now, by the same judge and prompts; None without a version."""
    version = context.tracker.version_of(model, alias)
    if version is None:
        return None
    name = f"{model} version {version.version}"
    for kind in EvaluateOutput.kinds():
        for key in layout.STAGE.keys(context.store, kind=kind):
            report = report_of(context.store, read_record(context.store, key, StageRecord))
            if report.checkpoint == version.checkpoint and may_be_compared(report, judged):
                return _Other(name, report)
    raise EvaluationError(
        f"{name}, which is `{alias}`, was not evaluated by these prompts and this judge in {context.store.url}",
        remedy="evaluate its checkpoint by the same settings in this store, or compare with a stage",
    )


def _score(report: EvalReport, name: str) -> float:
    if name not in report.scores:
        raise SettingsError(f"the evaluation has no score `{name}`", remedy=f"it has {', '.join(report.scores)}")
    return report.scores[name].value


KINDS = (StageKind("gate", GateStage, gate, check=check_gate, takes={"scores": EvaluateOutput.kinds()}),)

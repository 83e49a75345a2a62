"""Two evaluations of the same prompts and seeds side by side: what is different, and whether chance explains it."""

from __future__ import annotations

from typing import NamedTuple

from infra.errors import EvaluationError
from infra.records import EvalReport, Interval
from infra.store import Store
from pipelines.evaluation.judging import verdict_rows
from pipelines.evaluation.statistics import OVERALL, Difference, Scores, paired, wilson

_PERCENT = 100.0  # as DPG-Bench's scores are told everywhere


class Side(NamedTuple):
    name: str
    store: Store
    report: EvalReport


class Compared(NamedTuple):
    """A task's scores, or the overall ones, of both sides, and how a differs from b."""

    a: Interval  # of each side alone: Wilson's if the scores are shares of pictures, else without ends
    b: Interval
    difference: Difference


def compared(a: Side, b: Side, seed: int = 0) -> dict[str, Compared]:
    """Each task and the overall score. Refused if the two were not made of the same prompts, seeds and judge."""
    _refuse_others(a, b)
    scores_a, scores_b = (_scores(side) for side in (a, b))
    if _numbers(scores_a) != _numbers(scores_b):
        raise _not_the_same(a, b, "their pictures: both must have as many of each prompt, from the same seeds")
    by_prompt_a, by_prompt_b = (_by_prompt(scores) for scores in (scores_a, scores_b))
    differences = paired(by_prompt_a, by_prompt_b, seed=seed)
    if len(by_prompt_a) == 1:  # of a single task the overall score is its own
        differences = {OVERALL: differences[OVERALL]}
    scale = _PERCENT if a.report.protocol == "dpg" else 1.0
    return {
        name: Compared(
            _times(scale, _alone(by_prompt_a, name)),
            _times(scale, _alone(by_prompt_b, name)),
            difference._replace(interval=_times(scale, difference.interval)),
        )
        for name, difference in differences.items()
    }


def may_be_compared(a: EvalReport, b: EvalReport) -> bool:
    return (a.protocol, a.judge, a.prompts) == (b.protocol, b.judge, b.prompts)


def _refuse_others(a: Side, b: Side) -> None:
    for what in ("protocol", "judge", "prompts"):
        one, other = getattr(a.report, what), getattr(b.report, what)
        if one != other:
            raise _not_the_same(a, b, f"the {what} ({one} and {other})")


def _not_the_same(a: Side, b: Side, what: str) -> EvaluationError:
    return EvaluationError(
        f"{a.name} and {b.name} cannot be compared: they differ in {what}",
        remedy="evaluate both with the same prompts, number of images and judge",
    )


def _times(scale: float, score: Interval) -> Interval:
    low, high = (None if end is None else scale * end for end in (score.low, score.high))
    return Interval(value=scale * score.value, low=low, high=high)


# task -> number of the prompt -> number of its picture -> score
_Pictures = dict[str, dict[int, dict[int, float]]]


def _scores(side: Side) -> _Pictures:
    """The score of each picture from the report's table: right or wrong, if it has no column of scores."""
    if side.report.protocol == "fid":
        raise EvaluationError(
            f"{side.name} tells no score of single pictures", remedy="compare evaluations by GenEval or DPG-Bench"
        )
    scores: _Pictures = {}
    for row in verdict_rows(side.store, side.report.details):
        of_prompt = scores.setdefault(row["task"], {}).setdefault(row["prompt"], {})
        of_prompt[row["image"]] = float(row.get("score", row["correct"]))
    return scores


def _numbers(scores: _Pictures) -> dict[str, dict[int, set[int]]]:
    return {task: {prompt: set(pictures) for prompt, pictures in prompts.items()} for task, prompts in scores.items()}


def _by_prompt(scores: _Pictures) -> Scores:
    return {
        task: [[pictures[image] for image in sorted(pictures)] for _, pictures in sorted(prompts.items())]
        for task, prompts in scores.items()
    }


def _alone(scores: Scores, name: str) -> Interval:
    """A side's own score; the overall one is the mean of its tasks, as GenEval's is."""
    if name == OVERALL:
        values = [_alone(scores, task).value for task in scores]
        return Interval(value=sum(values) / len(values), low=None, high=None)
    pictures = [value for prompt in scores[name] for value in prompt]
    if set(pictures) <= {0.0, 1.0}:
        return wilson(sum(pictures), len(pictures))
    return Interval(value=sum(pictures) / len(pictures), low=None, high=None)

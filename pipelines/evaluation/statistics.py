"""Intervals for scores: a bootstrap over the prompts of each task, as pictures of one prompt are not independent.

In names of arrays P is a task's prompts, D the bootstrap's draws. A task's score is the mean over its pictures, the
overall score the mean of the tasks' scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from infra.errors import EvaluationError
from infra.records import Interval

Floats = npt.NDArray[np.float64]
Scores = Mapping[str, Sequence[Sequence[float]]]  # task -> prompt -> picture

OVERALL = "overall"
DRAWS = 10_000
# The prompts that a task needs to have an interval. With five, even the range from the lowest to the highest score
# contains the population's median with less than 95 % (1 - 2 / 2**n).
FEWEST = 6
_NORMAL_95 = 1.959963984540054  # standard deviations to each side that hold 95 % of a normal distribution
NO_INTERVAL = f"–: no interval, as there are fewer than {FEWEST} prompts a task, or all of them alike"


def intervals(scores: Scores, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Interval]:
    """Each task's score and the overall one, with 95 % intervals where there are prompts enough for them.

    A task whose prompts all score the same has no interval either, as it shows nothing of how prompts differ.
    """
    rng = np.random.default_rng(seed)
    values, deviations = {}, {}
    for task, prompts in scores.items():
        counts_DP = _resample(len(prompts), draws, rng)
        values[task], deviations[task] = _bootstrap(prompts, counts_DP)
    known = {task: len(prompts) >= FEWEST and bool(deviations[task].any()) for task, prompts in scores.items()}
    known[OVERALL] = all(len(prompts) >= FEWEST for prompts in scores.values()) and any(known.values())
    return _summary(values, deviations, known, lowest=0.0)


def without_interval(score: Interval) -> bool:
    """Whether the score has no interval; reports of older versions hold an interval of no width instead."""
    return score.low is None or score.low == score.high


def ends(score: Interval) -> str:
    """The interval as text: [0.612, 0.734], or a dash if there is none."""
    return "–" if without_interval(score) else f"[{score.low:.3f}, {score.high:.3f}]"


class Difference(NamedTuple):
    """How a differs from b on the same prompts."""

    interval: Interval  # of a - b
    better: float  # the share of draws in which a is better, and of half of those in which both are alike
    needed: int | None  # prompts with which one point would show: so many that the interval is narrower than that


POINT = 0.01


def paired(a: Scores, b: Scores, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Difference]:
    """The difference a - b of two evaluations of the same prompts; each draw resamples the same prompts in both."""
    if {task: len(prompts) for task, prompts in a.items()} != {task: len(prompts) for task, prompts in b.items()}:
        raise EvaluationError(
            "the two evaluations are not of the same prompts", remedy="evaluate both with one set of prompts"
        )
    rng = np.random.default_rng(seed)
    values, deviations = {}, {}
    for task in a:
        counts_DP = _resample(len(a[task]), draws, rng)
        value_a, deviation_a = _bootstrap(a[task], counts_DP)
        value_b, deviation_b = _bootstrap(b[task], counts_DP)
        values[task], deviations[task] = value_a - value_b, deviation_a - deviation_b
    known = {task: len(prompts) >= FEWEST for task, prompts in a.items()}
    summary = _summary(values, deviations, {**known, OVERALL: all(known.values())}, lowest=-1.0)
    prompts = {task: len(prompts) for task, prompts in a.items()}
    prompts[OVERALL] = sum(prompts.values())
    deviations[OVERALL] = np.mean(list(deviations.values()), axis=0)
    return {
        name: Difference(interval, _better(interval.value + deviations[name]), _needed(deviations[name], prompts[name]))
        for name, interval in summary.items()
    }


def _better(differences_D: Floats) -> float:
    return float(((differences_D > 0) + 0.5 * (differences_D == 0)).mean())


def _needed(deviations_D: Floats, prompts: int) -> int | None:
    """The deviation shrinks with the root of the number of prompts. None if it is not known, as none was seen."""
    deviation = float(deviations_D.std())
    return math.ceil(prompts * (_NORMAL_95 * deviation / POINT) ** 2) if deviation else None


def wilson(successes: float, trials: int) -> Interval:
    """The 95 % interval of a share (Wilson 1927). It takes pictures to be independent, and is known for any number."""
    share, z2 = successes / trials, _NORMAL_95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _NORMAL_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return Interval(value=share, low=max(middle - half, 0.0), high=min(middle + half, 1.0))


def _resample(prompts: int, draws: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """How often each draw has each prompt."""
    assert prompts > 0, "a task without prompts has no score"
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)


def _bootstrap(prompts: Sequence[Sequence[float]], counts_DP: npt.NDArray[np.int64]) -> tuple[float, Floats]:
    """A task's score, and the draws' deviations from it.

    A bootstrap over n prompts has a variance that is too small by (n - 1) / n, which matters for a dozen prompts; the
    deviations are enlarged to make up for it.
    """
    sums_P = np.array([sum(pictures) for pictures in prompts], np.float64)
    sizes_P = np.array([len(pictures) for pictures in prompts], np.float64)
    value = float(sums_P.sum() / sizes_P.sum())
    n = len(prompts)
    return value, ((counts_DP @ sums_P) / (counts_DP @ sizes_P) - value) * np.sqrt(n / max(n - 1, 1))


def _summary(
    values: Mapping[str, float], deviations: Mapping[str, Floats], known: Mapping[str, bool], lowest: float
) -> dict[str, Interval]:
    values = {**values, OVERALL: float(np.mean(list(values.values())))}
    deviations = {**deviations, OVERALL: np.mean(list(deviations.values()), axis=0)}
    summary = {}
    for name, value in values.items():
        summary[name] = Interval(value=value, low=None, high=None)
        if known[name]:
            low, high = value + np.quantile(deviations[name], (0.025, 0.975))
            summary[name] = Interval(value=value, low=float(max(low, lowest)), high=float(min(high, 1.0)))
    return summary

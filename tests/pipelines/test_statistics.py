from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import EvaluationError
from infra.records import Interval
from pipelines.evaluation import statistics

Scores = dict[str, list[list[float]]]

pictures = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4)
tasks = st.dictionaries(st.sampled_from("abcdef"), st.lists(pictures, min_size=1, max_size=8), min_size=1)


def holds(interval: Interval, value: float) -> bool:
    assert interval.low is not None and interval.high is not None
    return interval.low <= value <= interval.high


def width(interval: Interval) -> float:
    assert interval.low is not None and interval.high is not None
    return interval.high - interval.low


def simulate(rng: np.random.Generator, prompts: int = 12, easy: float = 2.0, hard: float = 1.5) -> tuple[Scores, float]:
    """Six tasks of prompts whose pictures are alike (some prompts are hard, some easy), and the true overall score."""
    chances = rng.beta(easy, hard, (6, prompts))
    drawn = rng.random((6, prompts, 4)) < chances[..., None]
    return {f"task {k}": drawn[k].astype(float).tolist() for k in range(6)}, easy / (easy + hard)


def test_intervals_cover_the_truth() -> None:
    """Prompts are a sample too: nominally 95 % of such intervals hold the mean over all prompts."""
    rng = np.random.default_rng(0)
    overall = one_task = 0
    for seed in range(300):
        scores, truth = simulate(rng)
        found = statistics.intervals(scores, seed=seed, draws=400)
        overall += holds(found["overall"], truth)
        one_task += holds(found["task 0"], truth)
    assert 0.91 <= overall / 300 <= 0.985
    assert 0.88 <= one_task / 300 <= 0.985  # a dozen prompts: a little short, as percentile intervals are


def test_pictures_of_a_prompt_are_not_independent() -> None:
    """Four equal pictures a prompt tell no more than one; were they resampled one by one, the interval would halve."""
    rng = np.random.default_rng(1)
    once = {"a": (rng.random((40, 1)) < 0.5).astype(float).tolist()}
    fourfold = {"a": [pictures * 4 for pictures in once["a"]]}
    single, repeated = (statistics.intervals(scores)["a"] for scores in (once, fourfold))
    assert width(repeated) == pytest.approx(width(single), rel=0.02)


def test_the_width_is_that_of_the_standard_error() -> None:
    rng = np.random.default_rng(2)
    for prompts in (6, 60):  # at six, resampling alone would fall a tenth short
        scores = {"a": rng.uniform(0.3, 0.7, (prompts, 4)).tolist()}
        interval = statistics.intervals(scores)["a"]
        error = np.mean(scores["a"], axis=1).std(ddof=1) / np.sqrt(prompts)
        assert width(interval) / 2 == pytest.approx(1.96 * error, rel=0.04)


@settings(max_examples=40, deadline=None)
@given(tasks)
def test_intervals_hold_their_values(scores: Scores) -> None:
    found = statistics.intervals(scores, draws=100)
    assert found == statistics.intervals(scores, draws=100)
    for task, prompts in scores.items():
        flat = [picture for prompt in prompts for picture in prompt]
        assert found[task].value == pytest.approx(np.mean(flat))
    assert found["overall"].value == pytest.approx(np.mean([found[task].value for task in scores]))
    for name, interval in found.items():
        enough = [len(prompts) >= statistics.FEWEST for task, prompts in scores.items() if name in (task, "overall")]
        if interval.low is not None:
            assert all(enough) and 0 <= interval.low <= interval.high <= 1  # type: ignore[operator]


def test_too_few_prompts_give_no_interval() -> None:
    found = statistics.intervals({"a": [[1, 1, 1, 0]] * 2, "b": [[1.0], [0.0]] * 6})
    assert (found["a"].value, found["a"].low, found["a"].high) == (0.75, None, None)
    assert found["b"].low is not None
    assert found["overall"].low is None, "it would hide that of one part nothing is known"
    assert [statistics.ends(found[name]) for name in ("a", "overall")] == ["–", "–"]
    five, six = ({"a": [[1.0], [0.0]] * 2 + [[1.0]] * more} for more in (1, 2))
    assert statistics.intervals(five)["a"].low is None
    assert statistics.intervals(six)["a"].low is not None


def test_prompts_that_are_all_alike_give_no_interval() -> None:
    """All wrong is not a score of 0.000 with 95 % certainty of its being just that."""
    found = statistics.intervals({"a": [[0.0, 0.0]] * 50, "b": [[1.0], [0.0]] * 6})
    assert (found["a"].value, found["a"].low) == (0, None)
    assert found["overall"].low is not None
    assert statistics.ends(Interval(value=0.75, low=0.75, high=0.75)) == "–", "as older reports have it"


def test_the_overall_score_weighs_tasks_alike() -> None:
    scores = {"large": [[1.0]] * 99, "small": [[0.0]]}
    assert statistics.intervals(scores, draws=10)["overall"].value == 0.5


def test_pairing_sees_what_two_intervals_would_not() -> None:
    rng = np.random.default_rng(3)
    worse, _ = simulate(rng)
    better = {task: [[1.0, *prompt[1:]] for prompt in prompts] for task, prompts in worse.items()}
    found = statistics.paired(better, worse)["overall"]
    difference = found.interval
    before, after = statistics.intervals(worse)["overall"], statistics.intervals(better)["overall"]
    assert difference.value == pytest.approx(after.value - before.value)
    assert holds(difference, difference.value) and not holds(difference, 0)
    assert before.high > after.low  # type: ignore[operator]
    same = statistics.paired(worse, worse)["overall"]
    assert (same.interval.low, same.interval.value, same.interval.high) == (0, 0, 0)
    assert (same.better, same.needed) == (0.5, None)
    assert found.better > 0.975


def test_paired_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for seed in range(200):
        chances = rng.beta(2, 2, (12, 1))
        a = (rng.random((12, 4)) < np.minimum(chances + 0.1, 1)).astype(float).tolist()
        b = (rng.random((12, 4)) < chances).astype(float).tolist()
        truth = 0.1 - 0.1**3 * (1 - 0.1 / 2)  # E[min(p + 0.1, 1) - p] for p from Beta(2, 2)
        found = statistics.paired({"a": a}, {"a": b}, seed=seed, draws=400)["a"].interval
        covered += holds(found, truth)
    assert 0.88 <= covered / 200 <= 0.99


def test_other_prompts_cannot_be_paired() -> None:
    with pytest.raises(EvaluationError):
        statistics.paired({"a": [[1.0]]}, {"a": [[1.0], [0.0]]})

"""Two evaluations side by side, and gates that ask for what is better beyond chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from infra import layout
from infra.config import parse
from infra.errors import EvaluationError, SettingsError
from infra.records import EvalReport, GateOutput, StageRecord, put_data, write_record
from infra.shards import parquet_bytes
from infra.store import Store, open_store
from infra.tracking import NOWHERE, Tracker, Version
from orchestration import workflow
from orchestration.artifacts import evaluation
from pipelines import recipes
from pipelines.evaluation import geneval
from pipelines.evaluation.compare import Side, compared
from pipelines.evaluation.judging import table_of
from pipelines.evaluation.prompts import shape_prompts
from pipelines.evaluation.statistics import intervals, wilson
from pipelines.page.report import build
from pipelines.stages.base import Context
from pipelines.stages.gate import GateStage, gate
from tests.pipelines import small_story

PROMPTS, IMAGES = 8, 4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def report(store: Store, chance: float, *, seed: int = 0, images: int = IMAGES, **changes: Any) -> EvalReport:
    """A report whose pictures are right as often as that; with the same seed, those of a lower chance are fewer."""
    rng = np.random.default_rng(seed)
    verdicts = [
        geneval.Verdict(prompt.tag, number, prompt.prompt, image, () if rng.random() < chance else ("wrong",))
        for number, prompt in enumerate(shape_prompts(PROMPTS))
        for image in range(images)
    ]
    fields: dict[str, Any] = {
        "protocol": "geneval",
        "judge": "shapes",
        "prompts": "1" * 16,
        "checkpoint": f"{chance}",
        "images": len(verdicts),
        "failed": 0,
        "scores": {f"geneval/{name}": s for name, s in intervals(geneval.by_task(verdicts), draws=100).items()},
        "details": put_data(store, "evaluations", "v.parquet", parquet_bytes(table_of(verdicts))),
        "pictures": [],
    }
    return EvalReport(**{**fields, **changes})


def side(store: Store, chance: float, **changes: Any) -> Side:
    return Side(f"{chance}", store, report(store, chance, **changes))


def test_differences_are_those_of_the_reports(store: Store):
    a, b = side(store, 0.8), side(store, 0.6)
    found = compared(a, b)
    for name, score in found.items():
        of_a, of_b = (each.report.scores[f"geneval/{name}"].value for each in (a, b))
        assert (score.a.value, score.b.value) == pytest.approx((of_a, of_b))
        assert score.difference.interval.value == pytest.approx(of_a - of_b)
    overall = found["overall"].difference
    assert overall.interval.low is not None and overall.interval.low > 0
    assert overall.better > 0.975
    back = compared(b, a)["overall"].difference
    assert back.interval.value == pytest.approx(-overall.interval.value)
    assert back.better == pytest.approx(1 - overall.better, abs=0.01)


def test_so_many_prompts_show_a_point(store: Store):
    """With n times as many prompts the interval is as wide as 1 / sqrt(n) of it: a point is half of its width then."""
    found = compared(side(store, 0.8), side(store, 0.6))["counting"].difference
    assert found.interval.low is not None and found.interval.high is not None and found.needed is not None
    half = (found.interval.high - found.interval.low) / 2
    assert half / np.sqrt(found.needed / PROMPTS) == pytest.approx(0.01, rel=0.08)


def test_wilson_is_the_textbooks():
    """Known values: 8 of 10 lie in [0.490, 0.943]; nothing of 10 in [0, 0.278]."""
    assert (wilson(8, 10).low, wilson(8, 10).high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (wilson(0, 10).low, wilson(0, 10).high) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prompts": "2" * 16}, "the prompts"),
        ({"judge": "mask2former"}, "the judge"),
        ({"protocol": "dpg"}, "the protocol"),
        ({"images": 2}, "as many of each prompt"),
    ],
)
def test_what_differs_in_more_than_the_checkpoint_is_refused(store: Store, changes: dict[str, Any], what: str):
    with pytest.raises(EvaluationError, match=what):
        compared(side(store, 0.8), side(store, 0.6, **changes))


# ------------------------------------------------------------------------------------------------- gates


class Registry:
    """A tracker that knows of one alias."""

    def __init__(self, version: Version | None) -> None:
        self.version = version
        self.asked: list[tuple[str, str]] = []

    def version_of(self, name: str, alias: str) -> Version | None:
        self.asked.append((name, alias))
        return self.version


def store_stage(store: Store, stage: StageRecord) -> None:
    write_record(store, layout.STAGE.at(kind=stage.kind, digest=stage.digest_of_work), stage)


def decide(store: Store, rule: dict[str, Any], tracker: Registry | None = None, **reports: EvalReport) -> GateOutput:
    made, inputs = small_story.Made(store), {}
    for number, (name, of_stage) in enumerate(reports.items()):
        output = {"record": made.put(name, of_stage), "scores": of_stage.values()}
        made.stage(name, "evaluate", output)
        store.create(
            f"stages/evaluate/{made.stages[-1].digest_of_work}.json", made.stages[-1].model_dump_json().encode()
        )
        inputs[f"scores.{number}"] = made.stages[-1]
    context = Context(store, Path(), cast(Tracker, tracker), NOWHERE, lambda *_: None)
    judged = [name for name in reports if name != "old"]
    settings = parse(GateStage, {"scores": judged, "rules": [rule], "model": "m"})
    decision = gate(context, settings, inputs)
    assert isinstance(decision, GateOutput)
    return decision


def test_by_interval_asks_for_more_than_luck(store: Store):
    better, worse = report(store, 0.8), report(store, 0.6)
    value = worse.scores["geneval/overall"].value
    others = (report(store, 0.6, seed=seed) for seed in range(1, 50))
    hardly = next(other for other in others if value < other.scores["geneval/overall"].value < value + 0.05)
    rule = {"above": "worse", "by": "interval"}
    assert decide(store, rule, new=better, worse=worse).passed
    [verdict] = decide(store, rule, hardly=hardly, worse=worse).verdicts
    assert not verdict.passed and verdict.value > value
    assert decide(store, {"above": "worse"}, hardly=hardly, worse=worse).passed, "by value it is above"


def test_a_distance_must_be_short(store: Store):
    scores = {"fid/fid": {"value": 12.0, "low": None, "high": None}}
    near, far = (
        report(store, 0.8, scores=scores),
        report(store, 0.7, scores={"fid/fid": {**scores["fid/fid"], "value": 30}}),
    )
    assert decide(store, {"score": "fid/fid", "at_most": 12.0}, near=near).passed
    assert not decide(store, {"score": "fid/fid", "at_most": 11.9}, near=near).passed
    assert decide(store, {"score": "fid/fid", "above": "far"}, near=near, far=far).passed
    [verdict] = decide(store, {"score": "fid/fid", "above": "near"}, far=far, near=near).verdicts
    assert (verdict.limit, verdict.passed) == ("below near's 12.000", False)


def test_a_champion_is_looked_up_and_a_first_model_has_none_to_beat(store: Store):
    new, old = report(store, 0.8), report(store, 0.6)
    registry = Registry(None)
    [verdict] = decide(store, {"above": "champion"}, registry, new=new).verdicts
    assert (verdict.limit, verdict.passed) == ("beyond m's champion, of which there is none yet", True)
    assert registry.asked == [("m", "champion")]
    [verdict] = decide(
        store, {"above": "champion", "by": "interval"}, Registry(Version("3", "0.6")), new=new, old=old
    ).verdicts
    assert verdict.limit.startswith(f"above m version 3's {old.scores['geneval/overall'].value:.3f} by [+")
    assert verdict.passed
    [verdict] = decide(store, {"above": "champion"}, Registry(Version("3", "0.8")), new=old, old=new).verdicts
    assert not verdict.passed
    with pytest.raises(EvaluationError, match="m version 3, which is `champion`, was not evaluated by these prompts"):
        decide(store, {"above": "champion"}, Registry(Version("3", "another")), new=new)


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("{score: geneval/overall}", "`at_least`, `at_most` or `above`"),
        ("{score: geneval/overall, at_least: 0.5, by: interval}", "`by: interval` needs `above`"),
        ("{score: fid/fid, above: low_score, by: interval}", "paired difference, which a score of all pictures"),
        ("{score: geneval/overall, above: champion}", "and the gate names no `model`"),
    ],
)
def test_rules_that_cannot_be_decided_are_refused(tmp_path: Path, rule: str, wrong: str):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: demo\nstages:\n  gate:\n    rules: [{rule}]\n")
    with pytest.raises(SettingsError, match=wrong):
        workflow.graph(recipes.load(str(path)))


# ------------------------------------------------------------------------------------------------- where they are found


def test_evaluations_are_found_by_stage_and_by_folder(store: Store, tmp_path: Path):
    made = small_story.make(store)
    for stage in made.stages:
        if stage.kind == "evaluate":
            store_stage(store, stage)
    _, found = evaluation("sft_score", store.url)
    assert found == made.named["sft_score"]
    with pytest.raises(SettingsError, match="did you mean `sft_score`"):
        evaluation("sft_scor", store.url)
    alone = open_store(str(tmp_path / "alone"))
    alone.put("evaluations/one/report.json", report(alone, 0.5).model_dump_json().encode())
    assert evaluation(str(tmp_path / "alone"), None)[1].judge == "shapes"
    with pytest.raises(SettingsError, match="holds no evaluations"):
        evaluation(str(tmp_path / "none"), None)


def test_the_page_compares_and_shows_what_is_right_and_wrong(store: Store):
    made = small_story.make(store, per_task=6, images=2)
    page = build(store, "two", made.stages)
    sft, low = (Side(name, store, made.named[name]) for name in ("sft_score", "low_score"))
    difference = compared(sft, low)["overall"]
    assert f"{difference.difference.interval.value:+.3f}" in page
    assert page.index("<h2>Compared") < page.index("<h2>Right and wrong") < page.index("<h2>Samples")

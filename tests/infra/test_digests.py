"""An upgrade keeps what was made: names of work do not move unless a format number does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import Field, create_model

from data_prep.prepare.plan import PrepareSettings
from data_prep.scores.job import ScoreSettings, scorer_digest
from data_prep.snapshots.build import snapshot_key
from data_prep.snapshots.settings import SnapshotSettings
from infra.config import Settings, digest, operational, parse
from orchestration import workflow
from pipelines import recipes
from pipelines.stages.kinds import KINDS

CLASSES = sorted(
    {kind.settings for kind in KINDS.values()} | {PrepareSettings, ScoreSettings, SnapshotSettings},
    key=lambda kind: kind.__name__,
)

# The work of the demo's stages. Each of these is in somebody's store: a change here trains their models anew.
DEMO = {
    "corpus": "07f4170b3eedd009",
    "prepare": "c182401b57bf575f",
    "low_data": "9fefd91d2d072031",
    "high_data": "3785ba2f8068fde1",
    "sft_data": "63865c204d22112f",
    "encoders": "7849c60ac29beb99",
    "low": "575ed020eda0c743",
    "low_score": "5b427464f54797d5",
    "low_dpg": "3e1d8e5f90515075",
    "high": "90d221b36afe54e9",
    "high_score": "d8e27f5ce2c965e0",
    "high_dpg": "063d62642f4aca87",
    "sft": "3f760b86d0976abc",
    "sft_score": "aead261a7b87cf59",
    "sft_dpg": "3d392746c2309469",
    "gate": "3d786ec85889319e",
    "register": "458ab51a7c9bd3ad",
    "report": "a3ef313a792476ac",
}


class Inner(Settings):
    deep: int = 1
    words: list[str] = Field([])


class Outer(Settings):
    given: int
    plain: float = 0.5
    inner: Inner = Inner()
    several: list[Inner] = Field([])
    speed: int = operational(4)


def outer(**changes: Any) -> str:
    return digest(parse(Outer, {"given": 1} | changes).chosen())


def test_what_has_its_default_is_left_out() -> None:
    assert parse(Outer, {"given": 1}).chosen() == {"given": 1}
    assert outer(plain=0.5, inner={"deep": 1}, several=[], speed=9) == outer()
    assert parse(Outer, {"given": 1, "inner": {"words": ["a"]}, "several": [{"deep": 1}, {"deep": 2}]}).chosen() == {
        "given": 1,
        "inner": {"words": ["a"]},
        "several": [{}, {"deep": 2}],
    }
    found = [outer(), outer(plain=1.0), outer(inner={"deep": 2}), outer(several=[{}]), outer(given=2)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_new_setting_with_a_default_renames_nothing(cls: type[Settings]) -> None:
    newer = create_model(f"Newer{cls.__name__}", __base__=cls, brand_new=(int, Field(7)))
    required = {name: field.annotation for name, field in cls.model_fields.items() if field.is_required()}
    values = {name: EXAMPLES[name] for name in required}
    values |= {name: values[name][0] for name, kind in required.items() if kind is str and name == "scores"}
    before, after = cls.model_validate(values), newer.model_validate(values)
    assert before.chosen() == after.chosen()
    assert newer.model_validate(values | {"brand_new": 8}).chosen() == before.chosen() | {"brand_new": 8}
    said = before.model_dump()
    assert cls.model_validate(said).chosen() == before.chosen(), "what is said and what is left out are the same"


EXAMPLES: dict[str, Any] = {
    "sources": [{"kind": "text_folder", "name": "mine", "url": "/mine"}],
    "sizes": [16],
    "size": 16,
    "shards": "prepare",
    "captions": "data",
    "data": "data",
    "checkpoint": "train",
    "scores": ["score"],
    "rules": [{"at_least": 0.5}],
    "gate": "gate",
    "scorer": {"kind": "clip", "name": "clip", "model": "ViT-B-32", "pretrained": "openai"},
    "steps": 10,
    "batch": 4,
}


def test_kinds_of_sources_are_told_apart_by_their_names_alone() -> None:
    facts = {"name": "mine", "url": "/mine"}
    found = [
        parse(PrepareSettings, {"sources": [{"kind": kind, **facts}], "sizes": [16]}).chosen()
        for kind in ("text_folder", "webdataset")
    ]
    assert found[0] != found[1]


def demo() -> dict[str, str]:
    recipe = recipes.load("demo")
    return {node.name: node.digest for node in workflow.graph(recipe)}


def test_the_demos_work_keeps_its_names() -> None:
    assert demo() == DEMO


def test_a_format_number_renames_its_kind_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = demo()
    monkeypatch.setitem(KINDS, "snapshot", replace(KINDS["snapshot"], format=2))
    after = demo()
    same = {name for name in before if after[name] == before[name]}
    assert same == {"corpus", "prepare"}


def test_plans_scores_and_snapshots_keep_their_names() -> None:
    scorer = {"kind": "clip", "name": "clip", "model": "ViT-B-32", "pretrained": "openai"}
    assert scorer_digest(parse(ScoreSettings, {"scorer": scorer})) == "c54ca54c401bd7ab"
    settings = parse(SnapshotSettings, {"size": 256, "filter": "not duplicate"})
    assert snapshot_key("plan", "edition", settings) == "snapshots/e2b206fabd8eabe1.json"

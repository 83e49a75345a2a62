"""`pixnerd plan` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.config import parse
from infra.errors import PixnerdError, SettingsError
from orchestration.parsing import parse_stages
from pipelines import recipes
from pipelines.planning import plans, shards
from tests.orchestration.test_cli import fails, pixnerd
from training.plan.machines import machines
from training.plan.stage import Rates

LARGE = """
name: large
stages:
  corpus: {kind: corpus, count: 1000}
  prepare:
    kind: prepare
    sources: [{kind: table_folder, name: own, url: "stage:corpus", tables: [captions.parquet], captions: [caption]}]
    sizes: [256, {name: b512, side: 512}]
  data: {kind: snapshot, shards: prepare, size: 256}
  train: {kind: train, data: data, steps: 1000, batch: 1536}
"""


def planned(recipe: recipes.Recipe, gpus: str):
    stages = {name: settings for name, (_, settings) in parse_stages(recipe).items()}
    return plans(stages, machines(gpus), Rates(0.4)), list(shards(stages, None))


def test_the_demo_is_planned_on_two_processes():
    result = pixnerd("plan", "demo", "--gpus", "2xcpu", "--peak-tflops", "0.05")
    assert result.returncode == 0, result.stderr
    assert "2 x cpu: memory not known; 0.05 TFLOP/s a rank, as you say" in result.stdout
    assert "high: tiny at 32 px, 1,300 steps of 32 images, fp32, micro_batch 16" in result.stdout
    assert "shards of `prepare`: about 5.76 MB for 6,000 images" in result.stdout
    assert "nothing was run" in result.stdout


def test_what_does_not_fit_is_told_with_what_helps(tmp_path: Path):
    path = tmp_path / "large.yaml"
    path.write_text(LARGE)
    price = ("--price-per-gpu-hour", "2", "--images", "45e6")
    found = json.loads(pixnerd("plan", path, "--gpus", "16xRTX4090", "--json", *price).stdout)
    [stage] = found["stages"]
    assert stage["fits"] is False
    assert stage["fits_with"] == [{"micro_batch": 12}]
    assert found["total"]["cost"] == pytest.approx(32 * found["total"]["hours"])
    assert found["shards"][0]["bytes"] == {"256": 45e6 * 256**2 * 0.75, "b512": 45e6 * 512**2 * 0.75}
    text = pixnerd("plan", path, "--gpus", "16xRTX4090").stdout
    assert "it does with --set train.micro_batch=12" in text


def test_an_unknown_gpu_is_refused_with_a_remedy():
    assert "did you mean H200" in fails(2, "plan", "demo", "--gpus", "16xH2000")


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_a_remedy():
    with pytest.raises(SettingsError, match=r"`low` cannot be trained on 3 x cpu: .*multiple of workers") as refused:
        planned(recipes.load("demo"), "3xcpu")
    assert "--set low.batch=N" in refused.value.remedy


def test_a_recipe_without_training_is_refused():
    recipe = parse(recipes.Recipe, {"name": "x", "stages": {"corpus": {"kind": "corpus"}}})
    with pytest.raises(SettingsError, match="trains nothing"):
        planned(recipe, "1xcpu")


def test_stages_that_wait_for_each_other_are_refused():
    stage = {"kind": "train", "data": "data", "steps": 1, "batch": 2}
    source = {"kind": "table_folder", "name": "a", "url": "/nowhere", "tables": ["a.csv"], "captions": ["b"]}
    data = {"data": {"kind": "snapshot", "shards": "corpus"}, "corpus": {"kind": "prepare", "sources": [source]}}
    both = {"a": stage | {"start_from": "b"}, "b": stage | {"start_from": "a"}}
    with pytest.raises(SettingsError, match="wait for each other"):
        planned(parse(recipes.Recipe, {"name": "x", "stages": data | both}), "1xcpu")


def test_encoders_are_those_that_a_run_would_take():
    demo = {plan.name: plan for plan in planned(recipes.load("demo"), "2xcpu")[0]}
    assert [demo[name].encoders.train_text for name in ("low", "high", "sft")] == [2, 2, 0]
    assert {plan.encoders.text.layers for plan in demo.values()} == {2}  # `sft` inherits the one that `low` names
    assert [plan.encoders.vision is not None for plan in demo.values()] == [True, False, False]
    assert all(plan.own_text for plan in demo.values())


@pytest.mark.parametrize("config", ["{}", "[]", "{", '{"hidden_size": null, "num_attention_heads": 0}'])
def test_a_strange_encoders_folder_is_refused(tmp_path: Path, config: str):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "large.yaml").write_text(LARGE)
    recipe = recipes.load(str(tmp_path / "large.yaml"), [f"train.text_encoder={tmp_path}"])
    with pytest.raises(PixnerdError, match="cannot be planned with"):
        planned(recipe, "16xH200")

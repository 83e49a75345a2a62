from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import SettingsError
from orchestration import parsing, workflow
from pipelines import recipes


def write(folder: Path, name: str, data: object) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_only_stages_that_fit_each_other(name: str):
    assert parsing.parse_stages(recipes.load(name))


def test_defaults_are_filled_in_by_kind(tmp_path: Path):
    base = {"train": {"optim": {"lr": 1, "clip": 2}}}
    stages = {"a": {"kind": "train", "optim": {"lr": 3}}, "b": {"kind": "gate"}}
    made = recipes.load(write(tmp_path, "x", {"name": "x", "defaults": base, "stages": stages}))
    assert made.stages["a"] == {"kind": "train", "optim": {"lr": 3, "clip": 2}}
    assert made.stages["b"] == {"kind": "gate"}


def test_a_recipe_may_start_from_another(tmp_path: Path):
    base = write(tmp_path, "base", {"name": "base", "stages": {"a": {"kind": "k", "x": 1}, "b": {"kind": "k"}}})
    made = recipes.load(write(tmp_path, "x", {"name": "x", "extends": base, "stages": {"a": {"x": 2}}}))
    assert made.name == "x"
    assert made.stages == {"a": {"kind": "k", "x": 2}, "b": {"kind": "k"}}


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path):
    path = write(tmp_path, "x", {"name": "x", "extends": str(tmp_path / "x.yaml"), "stages": {}})
    with pytest.raises(SettingsError, match="extends itself"):
        recipes.load(path)


def test_the_command_line_names_a_stage_first():
    assert recipes.load("demo", ["sft.steps=7"]).stages["sft"]["steps"] == 7
    assert recipes.load("demo", ["defaults.train.batch=8"]).stages["low"]["batch"] == 8


def test_the_command_line_names_a_kind_and_means_all_its_stages():
    made = recipes.load("demo", ["train.steps=7", "low.steps=8", "evaluate.sampling.steps=3", "prepare.sizes=[16]"])
    assert [made.stages[name]["steps"] for name in ("low", "high", "sft")] == [8, 7, 7]
    assert {made.stages[f"{name}_score"]["sampling"]["steps"] for name in ("low", "high", "sft")} == {3}
    assert made.stages["prepare"]["sizes"] == [16]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stf.steps=7", "unknown setting `stf.steps`: did you mean `sft`"),
        ("trian.steps=7", "did you mean `train`"),
        ("defaults.trian.batch=8", "no stage is of that kind: did you mean `train`"),
        ("default.train.batch=8", "did you mean `defaults`"),
        ("zzz.x=1", "its first part is a stage: corpus, prepare, low_data"),
        ("defaults.train.steps=7", "changes nothing: low, high, sft say it for themselves: write --set train.steps=7"),
        ("defaults.train.optim={warmup: 3, lr: 1}", "changes nothing: low, high, sft"),
        ("prepare.sources.3.url=x", "`stages.prepare.sources` .* is a list of 1"),
    ],
)
def test_an_assignment_that_does_nothing_is_refused(assignment: str, message: str):
    with pytest.raises(SettingsError, match=message):
        recipes.load("demo", [assignment])


STAGE = {"kind": "corpus"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "../../evil", "stages": {"a": STAGE}}, "`name`: '../../evil' cannot be used: write at most 100"),
        ({"name": "/tmp/x", "stages": {"a": STAGE}}, "`name`: '/tmp/x' cannot be used"),
        ({"name": "..", "stages": {"a": STAGE}}, "`name`: '..' cannot be used"),
        ({"name": "a\n", "stages": {"a": STAGE}}, "cannot be used"),
        ({"name": "", "stages": {"a": STAGE}}, "`name`: '' cannot be used"),
        ({"name": 7, "stages": {"a": STAGE}}, "`name` must be text, not the number 7: put it into quotes: '7'"),
        ({"stages": {"a": STAGE}}, "`name` is not set"),
        ({"name": "x", "stages": {"a/b": STAGE}}, "`stages.a/b`: 'a/b' cannot be used: write at most 100"),
        ({"name": "x", "stages": {"a.b": STAGE}}, "'a.b' cannot be used"),
        ({"name": "x", "stages": {7: STAGE}}, "`stages.7` is named by what is no text"),
        ({"name": "x", "stages": {}}, "`stages` must not be empty"),
        ({"name": "x", "stages": None}, "`stages` must be a mapping of `name: value` lines, not nothing"),
        ({"name": "x", "stages": [STAGE]}, "`stages` must be a mapping of `name: value` lines, not a list"),
        ({"name": "x", "stages": {"a": None}}, "`stages.a` must be a mapping of `name: value` lines, not nothing"),
        ({"name": "x", "stages": {"a": STAGE}, "defaults": 3}, "`defaults` must be a mapping"),
        ({"name": "x", "stages": {"a": STAGE}, "defaults": {"corpus": 3}}, "`defaults.corpus` must be a mapping"),
        ({"name": "x", "stages": {"a": STAGE}, "default": {}}, "unknown setting `default`: did you mean `defaults`?"),
        ({"name": "x", "zzz": 3}, "unknown setting `zzz`: known here: name, about, extends, defaults, stages"),
    ],
)
def test_a_recipe_of_another_shape_is_refused(tmp_path: Path, data: dict[str, Any], message: str):
    with pytest.raises(SettingsError) as caught:
        recipes.load(write(tmp_path, "x", data))
    assert message in str(caught.value)


def test_a_mistake_in_the_defaults_is_told_as_theirs(tmp_path: Path):
    data = {"name": "x", "defaults": {"corpus": {"counts": 3}}, "stages": {"a": STAGE, "b": STAGE | {"seed": "x"}}}
    with pytest.raises(SettingsError, match=r"unknown setting `defaults\.corpus\.counts`: did you mean `count`"):
        workflow.graph(recipes.load(write(tmp_path, "x", data)))
    with pytest.raises(SettingsError, match=r"`b\.seed` must be a whole number"):
        workflow.graph(recipes.load(write(tmp_path, "x", {**data, "defaults": None})))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean `demo`"):
        recipes.load("dmeo")


def test_the_readmes_recipe_has_no_misspelt_setting():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    parsed = {name: parsing.parse_stage(name, stage) for name, stage in recipe["stages"].items()}
    assert [kind.name for kind, _ in parsed.values()] == ["prepare", "score", "snapshot"]


TEN = """
name: ten
extends: demo
stages:
  corpus: {count: many}
  prepare: {sizes: [], qualty: 90}
  low_data: {shards: prepair}
  low: {steps: 0}
  high:
    start_from: sfd
  encoders: {seed: x}
  gate: {rules: [{score: geneval/overal, at_least: 0.1}]}
  register: {alias: v1}
  extra: {kind: snapshoot}
"""


def test_ten_mistakes_are_ten_lines_each_with_its_own(tmp_path: Path):
    path = tmp_path / "ten.yaml"
    path.write_text(TEN)
    with pytest.raises(SettingsError) as error:
        workflow.graph(recipes.load(str(path)))
    head, *told = str(error.value).splitlines()
    assert head == "there are 10 mistakes in the recipe `ten`: correct them and run again"
    assert [line.split(": ")[0] for line in told] == [
        f"  ten.yaml:{line}" for line in (5, 6, 6, 7, 8, 10, 11, 12, 13, 14)
    ]
    assert told[2] == "  ten.yaml:6: unknown setting `prepare.qualty`: did you mean `quality`?"
    assert told[5].startswith("  ten.yaml:10: `high.start_from` names the stage `sfd`")


def test_a_mistake_of_the_command_line_is_told_as_its_own(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"^--set: `low.steps` must be at least 1, not 0"):
        workflow.graph(recipes.load("demo", ["low.steps=0"]))
    with pytest.raises(SettingsError, match=r"^--set: `low.optim.lr` must be"):
        workflow.graph(recipes.load("demo", ["low.optim={lr: -1}"]))

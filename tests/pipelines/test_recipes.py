from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from infra.errors import SettingsError
from orchestration import workflow
from pipelines import recipes


def write(folder: Path, name: str, data: object) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_a_graph(name: str):
    assert workflow.graph(recipes.load(name))


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


@pytest.mark.parametrize(
    ("assignment", "message"),
    [("stf.steps=7", "did you mean `sft`"), ("defaults.trian.batch=8", "no stage is of that kind")],
)
def test_a_misspelt_assignment_is_refused(assignment: str, message: str):
    with pytest.raises(SettingsError, match=message):
        recipes.load("demo", [assignment])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean `demo`"):
        recipes.load("dmeo")


def test_the_readmes_recipe_has_no_misspelt_setting():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    parsed = {name: workflow.parse_stage(name, stage) for name, stage in recipe["stages"].items()}
    assert [kind.name for kind, _ in parsed.values()] == ["prepare", "score", "snapshot"]

"""The published recipes: what each says fits together, and a miniature of each runs from its corpora to its page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.config import Settings
from infra.records import SnapshotRecord, read_record
from infra.store import Store, open_store
from orchestration import parsing, workflow
from pipelines import recipes
from pipelines.planning import plans
from pipelines.stages.train import TrainStage
from tests.data_prep.small_scorers import build_clip, build_vlm
from tests.data_prep.web import Web
from tests.pipelines import published_corpora
from tests.pipelines.small_inception import write_inception
from training.plan.machines import machines
from training.plan.stage import Rates, StagePlan

MINIATURES = Path(__file__).parent / "miniatures"
PUBLISHED = sorted(path.stem for path in MINIATURES.glob("*.yaml"))
NAMED = [  # files that recipes say how to get, and that are hashed before anything runs
    "models/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    "models/weights-inception-2015-12-05-6726825d.pth",
    "models/inception.pth",
    "corpora/VIRTUAL_imagenet256_labeled.npz",
    "corpora/VIRTUAL_imagenet512.npz",
]
ONLY_IN_SMALL = {"encoders"}  # small random ones in place of a hub's


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: the corpora as they come, and models that are there by name alone."""
    folder = tmp_path_factory.mktemp("downloaded")
    published_corpora.write(folder / "corpora")
    for name in ("clip/open_clip_config.json", "vlm/config.json"):
        (folder / "models" / name).parent.mkdir(parents=True)
        (folder / "models" / name).write_text("{}")
    for name in NAMED:
        (folder / name).write_bytes(b"")
    return folder


def graph(name: str, *assignments: str) -> dict[str, workflow.Node]:
    return {node.name: node for node in workflow.graph(recipes.load(name, assignments))}


def planned(name: str, *assignments: str, gpus: str = "16xH200") -> dict[str, StagePlan]:
    stages = {key: settings for key, (_, settings) in parsing.parse_stages(recipes.load(name, assignments)).items()}
    return {plan.name: plan for plan in plans(stages, machines(gpus), Rates(0.4))}


def miniature(name: str) -> str:
    return str(MINIATURES / f"{name}.yaml")


def test_every_recipe_but_the_demo_has_a_miniature():
    assert sorted(set(recipes.names()) - {"demo"}) == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_corpora_are_found_where_the_recipe_says_how_to_get_them(
    name: str, downloaded: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(downloaded)
    nodes = graph(name)
    assert {"prepare", "train", "sample", "report"} <= {node.kind.name for node in nodes.values()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_miniature_has_the_stages_of_its_recipe(name: str, downloaded: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(downloaded)
    large, small = graph(name), graph(miniature(name))
    assert small.keys() - large.keys() == ONLY_IN_SMALL
    for stage, node in large.items():
        of_small = {setting: target for setting, target in small[stage].inputs.items() if target not in ONLY_IN_SMALL}
        assert small[stage].kind is node.kind
        assert node.kind.reads_all or of_small == node.inputs, stage
        if isinstance(node.settings, TrainStage):
            _is_smaller(node.settings, small[stage].settings)


def _is_smaller(large: TrainStage, small: Settings) -> None:
    """Whatever is no size keeps its value, so that the miniature tries what the recipe will do."""
    assert isinstance(small, TrainStage)
    assert small.steps < large.steps
    kept = ("prediction", "noise_scale", "text_padding", "coordinate_code", "field_norm", "task")
    assert [getattr(small.network(), name) for name in kept] == [getattr(large.network(), name) for name in kept]
    ours, theirs = large.objective.model_dump(), small.objective.model_dump()
    assert ours | {"repa_block": 0} == theirs | {"repa_block": 0}
    assert (large.optim.betas, large.optim.lr, large.optim.clip, large.pack_text) == (
        small.optim.betas,
        small.optim.lr,
        small.optim.clip,
        small.pack_text,
    )


# What it takes


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_fits_on_sixteen_gpus(name: str):
    assert all(plan.fits() for plan in planned(name).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_readme_tells_the_hours_and_the_cost_that_are_planned(name: str):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| \[`{name}`\].*\| (\d+) h, ([\d,]+) \$ \|", readme, re.MULTILINE)
    assert found, "no row of the table"
    hours = sum(plan.hours or 0 for plan in planned(name).values())
    assert int(found[1]) == round(hours)
    assert int(found[2].replace(",", "")) == pytest.approx(16 * 3.5 * hours, rel=0.05)


def test_what_does_not_fit_is_told_with_a_way_out():
    cramped = planned("t2i_xxl", gpus="16xA100-40")
    assert not cramped["pretrain_512"].fits()
    assert cramped["pretrain_512"].ways()


def test_the_whole_published_recipe_takes_the_flop_that_were_counted():
    """8.3e20, counted apart from this code."""
    assert sum(plan.flop for plan in planned("t2i_xxl").values()) == pytest.approx(8.3e20, rel=0.02)


@pytest.mark.parametrize(
    ("name", "stage", "millions"),
    [("t2i_xxl", "sft", 1171.5), ("imagenet_xl", "tune_512", 700.6), ("t2i_cc12m", "sft", 252)],
)
def test_the_networks_have_the_published_sizes(name: str, stage: str, millions: float):
    assert planned(name)[stage].network / 1e6 == pytest.approx(millions, rel=1e-3)


# What the comments of a recipe tell to set


def comments(name: str) -> Iterator[str]:
    for line in recipes.find(name).read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\s*# ?(.*)", line):
            yield found[1]


def test_the_larger_network_is_had_as_the_recipe_says():
    assignments = re.findall(r"--set ((?:train|pretrain|sft)\.\S+)", "\n".join(comments("t2i_cc12m")))
    assert len(assignments) == 7
    larger = planned("t2i_cc12m", *assignments)
    assert larger["sft"].network / 1e6 == pytest.approx(905, rel=1e-3)
    assert larger["pretrain"].settings.optim.lr == 2e-4
    assert larger["pretrain"].settings.ema.decay == 0.9999
    assert all(plan.fits() for plan in larger.values())


def options() -> list[dict[str, Any]]:
    lines = (re.match(r"(objective|optim): \{.*\}", line) for line in comments("t2i_cc12m"))
    return [yaml.safe_load(line[0]) for line in lines if line]


def test_the_further_options_that_it_names_can_be_set():
    named = options()
    assert [list(option) for option in named] == [["objective"]] * 3 + [["optim"]]
    recipe = recipes.load("t2i_cc12m")
    for option in named:
        _, settings = parsing.parse_stage("pretrain", recipes.merge(recipe.stages["pretrain"], option))
        assert isinstance(settings, TrainStage)
        changed = settings.results()
        assert all(recipes.merge(changed[key], value) == changed[key] for key, value in _plain(option).items())


def _plain(option: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(option))
    return plain


# Miniatures, from end to end


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same folder with real small models, while the web answers."""
    folder = tmp_path_factory.mktemp("at-hand")
    build_clip(folder / "models/clip")
    build_vlm(folder / "models/vlm", "qwen2_5")
    write_inception(folder / "models/inception.pth")
    with Web() as web:
        web.pages |= published_corpora.write(folder / "corpora", web.url())
        yield folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_miniature_runs_from_its_corpora_to_its_page(name: str, at_hand: Path):
    command = [sys.executable, "-m", "orchestration.cli", "run", miniature(name), "--store", name, "--json"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=at_hand, env=environment, capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.keys() == recipes.load(miniature(name)).stages.keys()
    page = Path(told["report"]["output"]["path"]).read_text(encoding="utf-8")
    assert all(stage in page for stage in told.keys() - {"report"})
    _holds_each_source(name, told, open_store(str(at_hand / name)))
    if "register" in told:
        assert told["register"]["output"]["alias"] == "champion"


def _holds_each_source(name: str, told: dict[str, Any], store: Store) -> None:
    """Each source of the recipe gave samples to each snapshot of its shards: its files were found and read."""
    stages = recipes.load(name).stages
    for stage in stages:
        if stages[stage]["kind"] == "snapshot":
            record = read_record(store, told[stage]["output"]["record"], SnapshotRecord)
            sources = {source["name"] for source in stages[stages[stage]["shards"]]["sources"]}
            assert {source for source, counts in record.by_source.items() if counts[-1]} == sources

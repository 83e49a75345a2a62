"""Sweeps: every point is drawn and judged on the same noise, and the rule chooses what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infra import layout
from infra.config import digest, parse
from infra.errors import SettingsError
from infra.records import CheckpointRecord, read_record
from infra.store import Store, open_store
from pipelines.evaluation import chunks, sweep
from pipelines.evaluation.generate import Drawing, chunked
from pipelines.evaluation.prompts import other_shape_prompts, shape_prompts
from pipelines.evaluation.sets import read_prompts
from pipelines.evaluation.sweep import Point, SweepSettings, chosen
from pipelines.evaluation.tars import PICTURES
from pipelines.pictures.sweep import draw
from tests.training import small_checkpoint
from training import checkpoint as checkpoints

SMALL: dict[str, Any] = {"per_task": 2, "images": 1, "sampling": {"batch": 6}, "steps": [1, 2], "guidance": [1.0, 3.0]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def nothing(*_: Any) -> None: ...


def settings(**changes: Any) -> SweepSettings:
    return parse(SweepSettings, SMALL | changes)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Work is done in this process, and the networks that are loaded are noted: the pool has tests of its own."""
    noted: list[str] = []

    def make(shelf: chunks.Shelf, maker: Any, items: Any, needs: Any, show: Any) -> list[chunks.Chunk]:
        actor = chunks._Actor(shelf, maker, "cpu")
        return [actor.do(*item) for item in items.items()]

    load = Drawing.load

    def noting(drawing: Drawing, device: str) -> None:
        noted.append(drawing.checkpoint.digest())
        load(drawing, device)

    monkeypatch.setattr(sweep, "make", make)
    monkeypatch.setattr(Drawing, "load", noting)
    return noted


def test_every_point_is_scored_with_one_network(store: Store, tmp_path: Path, loaded: list[str]):
    checkpoint = checkpoints.publish_folder(store, small_checkpoint.write_text(tmp_path / "net"))
    asked = settings(solver=["euler", "heun"])
    found = sweep.sweep(store, {None: checkpoint}, asked, nothing)
    assert [scored.point for scored in found.points] == asked.points()
    assert len(found.points) == 8
    assert loaded == [checkpoint.digest()]
    assert all(scored.failed == 0 and "geneval/overall" in scored.scores for scored in found.points)
    assert sweep.sweep(store, {None: checkpoint}, asked, nothing) == found
    assert loaded == [checkpoint.digest()], "what is there is not made again"
    draw(found, tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").width > 500


def test_a_point_draws_what_its_settings_alone_would(store: Store, tmp_path: Path, loaded: list[str]):
    checkpoint = checkpoints.publish_folder(store, small_checkpoint.write_text(tmp_path / "net"))
    asked = settings()
    sweep.sweep(store, {None: checkpoint}, asked, nothing)
    stage = sweep.stage_of(digest([checkpoint.digest()]), asked)
    batches = chunked([prompt.prompt for prompt in read_prompts(asked)], 1, asked.sampling)
    cells, drawn = sweep._places(asked.points(), batches), set()
    for number, (k, first) in enumerate(cells):
        alone = Drawing(store, checkpoint, 1, asked.points()[k].sampling(asked.sampling))
        alone.load("cpu")
        made = alone.make(batches[first])
        chunk = read_record(store, layout.SWEEPING.at(stage=stage, first=number), chunks.Chunk)
        assert store.get(chunk.data[PICTURES].key) == made.files[f"{PICTURES}.tar"]
        drawn.add(chunk.data[PICTURES].sha256)
    assert len(drawn) >= len(asked.points()), "each point draws others"


def test_each_decay_is_a_network_that_is_loaded_once(store: Store, tmp_path: Path, loaded: list[str]):
    decays: dict[float | None, CheckpointRecord] = {
        decay: checkpoints.publish_folder(store, small_checkpoint.write_text(tmp_path / str(decay), hidden=hidden))
        for decay, hidden in ((0.9, 32), (0.99, 48))
    }
    found = sweep.sweep(store, decays, settings(decay=[0.9, 0.99]), nothing)
    assert len(found.points) == 8
    assert loaded == [record.digest() for record in decays.values()]


@pytest.mark.parametrize("prompts", ["shapes", "official", "rephrased", {"seeded": 100}, {"seeded": 5, "seed": 43}])
def test_the_tests_own_prompts_are_refused(prompts: Any):
    with pytest.raises(SettingsError, match="gives the test's prompts"):
        settings(prompts=prompts)
    assert settings(prompts={"seeded": 5, "seed": 7}).points()


def test_a_value_that_sampling_refuses_is_told_at_once():
    with pytest.raises(SettingsError, match="solver"):
        settings(solver=["eulr"])


def test_other_shapes_are_none_of_the_tests():
    ours = other_shape_prompts(8)
    assert not {prompt.prompt for prompt in ours} & {prompt.prompt for prompt in shape_prompts(12)}
    assert {prompt.tag for prompt in ours} == {prompt.tag for prompt in shape_prompts(1)}
    assert ours == other_shape_prompts(8) != other_shape_prompts(8, seed=1)


def test_the_rule_is_followed():
    """Ten prompts: the second point is a little better than the first, and three times as dear; the third is bad."""
    points = [
        Point(guidance=1.0, steps=10, solver="euler"),
        Point(guidance=4.0, steps=15, solver="euler"),
        Point(guidance=1.0, steps=2, solver="euler"),
    ]
    good = {"a": [[1.0]] * 7 + [[0.0]] * 3}
    better = {"a": [[1.0]] * 8 + [[0.0]] * 2}
    bad = {"a": [[1.0]] * 1 + [[0.0]] * 9}
    assert chosen(points, [good, better, bad], "best", 0) == 1
    assert chosen(points, [good, better, bad], "cheapest", 0) == 0
    assert chosen(points[:2], [good, good], "best", 0) == 0, "of equals the cheaper one"


def test_what_a_picture_costs():
    euler, heun = (Point(guidance=2.0, steps=10, solver=solver) for solver in ("euler", "heun"))
    assert (euler.evaluations, heun.evaluations) == (20, 40)
    assert Point(guidance=1.0, steps=10, solver="euler").evaluations == 10

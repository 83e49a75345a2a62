"""`pixnerd checkpoint ema` and `fetch --step`: what a training kept comes out of the store as a checkpoint's folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from infra import layout
from infra.errors import CheckpointError, SettingsError
from infra.records import AveragesPart, AveragesRecord, Profile, TrainOutput, put_data, write_record
from infra.store import FileStore, Store
from orchestration.commands.checkpoint import ema, fetch
from tests.infra.stage_records import record_of
from training import checkpoint
from training import model as models
from training.model import ModelConfig, PixNerd

HOME = layout.TRAINING.at(run="ab12")
FACTS: dict[str, Any] = {"run": "ab12", "snapshot": "data", "start_from": None}
CONFIG = ModelConfig(hidden=16, heads=2, blocks=1, text_blocks=0, image_size=16, patch_size=8, text_dim=8)
PROFILES = {
    "ema": Profile(decay=0.9),
    "ema-sigma-0.05": Profile(sigma_rel=0.05),
    "ema-sigma-0.1": Profile(sigma_rel=0.1),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A training at its sixth step; all of its weights are the step's number, and so are their averages."""
    store = FileStore(tmp_path / "store")
    for step in (2, 4, 6):
        net = PixNerd(CONFIG)
        for parameter in net.parameters():
            torch.nn.init.constant_(parameter, float(step))
        key = layout.CHECKPOINT_AT.at(home=HOME, step=step)
        write = partial(models.save, net=net, extra={"text_encoder": "someone/encoder"})
        checkpoint.publish(store, HOME, write, key=key, step=step, position=4 * step, parameters=1, **FACTS)
        values = {f"net.{name}": parameter.detach().flatten() for name, parameter in net.named_parameters()}
        files = {
            name: put_data(
                store, layout.AVERAGES_PARTS.at(home=HOME), f"{step:08d}-00000-{number}.safetensors", save(values)
            )
            for number, name in enumerate(PROFILES)
        }
        part = AveragesPart(files=files, ranges={name: (0, len(flat)) for name, flat in values.items()})
        record = AveragesRecord(step=step, position=4 * step, profiles=PROFILES, parts=[part], **FACTS)
        write_record(store, layout.AVERAGES.at(home=HOME, step=step), record)
    return store


def ended(store: Store) -> None:
    last = layout.CHECKPOINT.at(home=HOME)
    store.put(last, store.get(layout.CHECKPOINT_AT.at(home=HOME, step=6)))
    stage = record_of(TrainOutput(record=last, parameters=1, images_seen=24), stage="mine")
    write_record(store, layout.STAGE.at(kind="train", digest="ab12"), stage)


def make(store: Store, stage: str, folder: Path | None = None, **options: Any) -> None:
    chosen = {"decay": None, "sigma_rel": None, "step": None, "json_": False} | options
    ema(stage, store.url, folder, **chosen)


def weight(folder: Path) -> float:
    return float(models.load(folder).state_dict()["stem.bias"][0])


def test_an_average_is_told_with_how_it_was_made(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ended(store)
    make(store, "mine", tmp_path / "own", sigma_rel=0.1)
    assert "training tracked this average itself" in capsys.readouterr().out
    assert weight(tmp_path / "own") == 6
    make(store, "mine", tmp_path / "other", sigma_rel=0.12)
    assert "made of 9 averages; " in capsys.readouterr().out
    assert weight(tmp_path / "other") != 6  # of all three steps
    make(store, "mine", tmp_path / "json", decay=0.9, step=4, json_=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["averages"], told["misplaced"]) == (4, 1, 0)
    config, extra = models.read_config(tmp_path / "json")
    assert config == CONFIG
    assert extra["text_encoder"] == "someone/encoder"
    assert extra["average"]["decay"] == 0.9


def test_a_training_that_goes_on_is_named_by_a_record(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(CheckpointError, match="no checkpoint of a stage `mine`") as refused:
        make(store, "mine", tmp_path / "a", decay=0.9)
    assert refused.value.remedy == "it has training/ab12/checkpoints/00000006.json"
    make(store, f"{HOME}/averages/00000004.json", tmp_path / "b", decay=0.9, step=2)
    assert weight(tmp_path / "b") == 2
    fetch("training/ab12/checkpoints/00000004.json", tmp_path / "c", store.url, step=None, json_=False)
    assert weight(tmp_path / "c") == 4
    assert "step 4 of" in capsys.readouterr().out


def test_without_a_folder_it_tells_what_was_kept(store: Store, capsys: pytest.CaptureFixture[str]):
    ended(store)
    make(store, "mine")
    assert "decay 0.9, sigma_rel 0.05, sigma_rel 0.1" in capsys.readouterr().out
    make(store, "mine", json_=True)
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [2, 4, 6]


def test_a_checkpoint_of_an_earlier_step_is_fetched(store: Store, tmp_path: Path):
    ended(store)
    fetch("mine", tmp_path / "two", store.url, step=2, json_=False)
    fetch("mine", tmp_path / "last", store.url, step=6, json_=False)
    assert (weight(tmp_path / "two"), weight(tmp_path / "last")) == (2, 6)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3") as refused:
        fetch("mine", tmp_path / "three", store.url, step=3, json_=False)
    assert refused.value.remedy == "steps: 2, 4, 6"


@pytest.mark.parametrize("wanted", [{}, {"decay": 0.9, "sigma_rel": 0.1}, {"decay": 1.0}, {"sigma_rel": 0.0}], ids=str)
def test_what_is_no_average_is_refused(store: Store, tmp_path: Path, wanted: dict[str, float]):
    ended(store)
    with pytest.raises(SettingsError):
        make(store, "mine", tmp_path / "a", **wanted)
    assert not (tmp_path / "a").exists()


def test_nothing_is_written_over(store: Store, tmp_path: Path):
    ended(store)
    with pytest.raises(SettingsError, match="is not empty"):
        make(store, "mine", tmp_path, decay=0.9)

"""What a run leaves for good: several averages, checkpoints on the way, and averages that are made afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from infra import layout
from infra.errors import CheckpointError
from infra.records import AveragesRecord, CheckpointRecord, read_record
from infra.store import Store, open_store
from tests.training import small_run
from training import checkpoint, posthoc
from training import model as models
from training.ema import EmaSettings
from training.loop import train
from training.publish import Publisher
from training.sampling import Artist, SampleSettings

SEVERAL = {"decay": 0.9, "more_decays": [0.5], "sigma_rel": [0.05, 0.1], "keep_every": 2}
CHANGES: dict[str, Any] = {"ema": SEVERAL, "save_every": 2, "export_every": 2}
HOME = "training/several"
Run = Callable[..., CheckpointRecord]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def run(store: Store, alone: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains on one rank, in this process; with `kill_after` it breaks off behind the state of that step."""
    folder = tmp_path_factory.mktemp("inputs")
    snapshot = small_run.write_data(folder / "corpus", store)
    encoders = small_run.write_encoders(folder / "encoders", store)

    def trained(name: str, kill_after: int | None = None, **changes: Any) -> CheckpointRecord:
        def say(message: dict[str, Any]) -> None:
            if message["event"] == "saved" and message["step"] == kill_after:
                raise Killed

        return train(small_run.job_in(store, snapshot, encoders, name, **changes), say)

    return trained


@pytest.fixture(scope="module")
def several(run: Run) -> CheckpointRecord:
    return run("several", **CHANGES)


def hashes(record: CheckpointRecord) -> dict[str, str]:
    return {name: data.sha256 for name, data in record.files.items()}


def on_the_way(store: Store, home: str) -> dict[int, CheckpointRecord]:
    return {
        layout.CHECKPOINT_AT.parts(key)["step"]: read_record(store, key, CheckpointRecord)
        for key in layout.CHECKPOINT_AT.keys(store, home=home)
    }


def kept(store: Store, home: str) -> dict[int, list[dict[str, str]]]:
    return {
        record.step: [{name: data.sha256 for name, data in part.files.items()} for part in record.parts]
        for record in posthoc.averages(store, home)
    }


def made(store: Store, folder: Path, **wanted: Any) -> posthoc.Made:
    return posthoc.make(store, HOME, folder, **({"decay": None, "sigma_rel": None, "step": None} | wanted))


def test_a_checkpoint_on_the_way_is_what_a_run_would_publish_that_ends_there(
    run: Run, store: Store, several: CheckpointRecord, tmp_path: Path
):
    exported = on_the_way(store, HOME)
    assert sorted(exported) == [2, 4]
    assert [(record.step, record.position) for record in exported.values()] == [(2, 8), (4, 16)]
    shorter = run("shorter", steps=4)  # with a single average, and no other checkpoint
    assert hashes(exported[4]) == hashes(shorter)
    assert (exported[4].parameters, exported[4].snapshot) == (shorter.parameters, shorter.snapshot)
    artist = Artist.load(checkpoint.fetch(store, exported[2], tmp_path / "two"))
    assert artist.draw(["a red circle"], [0], SampleSettings(steps=2, batch=1)).shape == (1, 16, 16, 3)


def test_each_of_several_averages_is_that_of_a_run_with_this_one_alone(
    run: Run, store: Store, several: CheckpointRecord, tmp_path: Path
):
    assert hashes(several) == hashes(run("first", ema={"decay": 0.9}))
    alone = hashes(run("second", ema={"decay": 0.5}))
    assert made(store, tmp_path / "second", decay=0.5) == (6, 1, 0)
    sums = (tmp_path / "second" / "SHA256SUMS").read_text().split()
    assert {name: alone[name] for name in alone if name not in ("config.json", "SHA256SUMS")}.items() <= {
        name: sha256 for sha256, name in zip(sums[::2], sums[1::2], strict=True)
    }.items()
    _, extra = models.read_config(tmp_path / "second")
    assert extra["average"] == {"decay": 0.5, "warmup": False, "sigma_rel": None, "step": 6}


def test_another_width_is_what_tracking_it_would_have_given(
    run: Run, store: Store, several: CheckpointRecord, tmp_path: Path
):
    told = made(store, tmp_path / "made", sigma_rel=0.08, step=4)
    run("tracked", ema={"sigma_rel": [0.08], "keep_every": 2}, save_every=2)
    posthoc.make(store, "training/tracked", tmp_path / "tracked", decay=None, sigma_rel=0.08, step=4)
    assert told.misplaced < 0.01
    ours, direct, narrow = (
        {k: v for path in sorted(folder.rglob("*.safetensors")) for k, v in load_file(path).items()}
        for folder in (
            tmp_path / "made",
            tmp_path / "tracked",
            checkpoint.fetch(store, on_the_way(store, HOME)[4], tmp_path / "published"),
        )
    )
    moved = sum(float((direct[name] - narrow[name]).abs().sum()) for name in direct)
    assert sum(float((direct[name] - ours[name]).abs().sum()) for name in direct) < 0.05 * moved


def test_a_killed_run_leaves_the_same_for_good(run: Run, store: Store, several: CheckpointRecord):
    with pytest.raises(Killed):
        run("several-killed", kill_after=2, **CHANGES)
    resumed = run("several-killed", **CHANGES)
    assert hashes(resumed) == hashes(several)
    assert kept(store, "training/several-killed") == kept(store, HOME)
    assert sorted(kept(store, HOME)) == [2, 4, 6]
    ours, theirs = on_the_way(store, "training/several-killed"), on_the_way(store, HOME)
    assert {step: hashes(record) for step, record in ours.items()} == {s: hashes(r) for s, r in theirs.items()}


def test_a_run_with_a_single_average_keeps_nothing_beside_its_checkpoint(run: Run, store: Store):
    run("single")
    entries = {entry.key.split("/")[2] for entry in store.list("training/single/")}
    assert {name for name in entries if not name.startswith("curve-")} == {"checkpoint", "checkpoint.json"}
    with pytest.raises(CheckpointError, match="no averages were kept"):
        posthoc.averages(store, "training/single")


def test_what_was_not_kept_or_cannot_be_made_is_refused(store: Store, several: CheckpointRecord, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no averages of step 3 were kept") as refused:
        made(store, tmp_path / "a", decay=0.5, step=3)
    assert refused.value.remedy == "steps: 2, 4, 6"
    only = AveragesRecord.model_validate(posthoc.averages(store, HOME)[0].model_dump() | {"run": "x", "step": 500})
    narrow = {name: profile for name, profile in only.profiles.items() if name in ("ema", "ema-sigma-0.05")}
    record = only.model_copy(update={"profiles": narrow})
    store.put("training/other/averages/00000500.json", record.model_dump_json().encode())
    with pytest.raises(CheckpointError, match="% of its weight would lie at other steps"):
        posthoc.make(store, "training/other", tmp_path / "b", decay=None, sigma_rel=0.28, step=None)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        posthoc.make(store, "training/other", tmp_path / "c", decay=0.9, sigma_rel=None, step=None)


def test_steps_that_a_run_went_back_behind_are_taken_back(tmp_path: Path):
    store = open_store(str(tmp_path))
    places = (layout.AVERAGES, layout.CHECKPOINT_AT)
    keys = [place.at(home=HOME, step=step) for place in places for step in (2, 4, 6)]
    for key in keys:
        store.put(key, b"{}")
    team: Any = SimpleNamespace(on_rank_0=lambda work: work())
    nothing: Any = None
    Publisher(store, HOME, team, lambda: None, {}, nothing, {}, EmaSettings(), 2, 6).take_back(4)
    assert [store.exists(key) for key in keys] == [True, True, False] * 2

"""A training run's laws: stopped and resumed it gives the same bytes, on other ranks the same model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from infra.errors import CheckpointError, DataError, SettingsError, TrainingError
from infra.records import CheckpointRecord, DataObject, SnapshotRecord, get_data
from infra.store import Store, open_store
from tests.training import small_run
from training import checkpoint
from training import model as models
from training.loop import Job, train
from training.sampling import Artist, SampleSettings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def snapshot(store: Store, tmp_path_factory: pytest.TempPathFactory) -> SnapshotRecord:
    return small_run.write_data(tmp_path_factory.mktemp("data") / "corpus", store)


@pytest.fixture(scope="module")
def encoders(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, DataObject]]:
    return small_run.write_encoders(tmp_path_factory.mktemp("encoders"), store)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one rank, in this process."""
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def make(store: Store, snapshot: SnapshotRecord, encoders: Any) -> Any:
    return lambda name, **changes: small_run.job_in(store, snapshot, encoders, name, **changes)


class Killed(Exception):
    pass


def run(job: Job, kill_after: int | None = None) -> CheckpointRecord:
    """Trains; with `kill_after` it breaks off behind the state committed at that step, as a kill would."""

    def say(message: dict[str, Any]) -> None:
        if message["event"] == "saved" and message["step"] == kill_after:
            raise Killed

    return train(job, say)


def weights(store: Store, record: CheckpointRecord, folder: Path) -> dict[str, torch.Tensor]:
    return models.load(checkpoint.fetch(store, record, folder)).state_dict()


def curve(store: Store, record: CheckpointRecord) -> list[dict[str, float]]:
    assert record.curve is not None
    return pq.read_table(pa.BufferReader(get_data(store, record.curve))).to_pylist()


@pytest.fixture(scope="module")
def undisturbed(
    alone: None, store: Store, snapshot: SnapshotRecord, encoders: dict[str, dict[str, DataObject]]
) -> CheckpointRecord:
    return run(small_run.job_in(store, snapshot, encoders, "undisturbed"))


def test_a_killed_run_resumes_to_the_same_bytes(store: Store, make: Any, undisturbed: CheckpointRecord):
    job = make("killed")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    assert checkpoint.published(store, job.prefix) is None
    resumed = run(job)
    for name in ("model.safetensors", "repa.safetensors", "text/model.safetensors"):
        assert resumed.files[name].sha256 == undisturbed.files[name].sha256, name


def test_the_curve_has_no_gap_and_no_repeat_after_a_resume(store: Store, make: Any, undisturbed: CheckpointRecord):
    job = make("killed-curve")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    rows, expected = curve(store, run(job)), curve(store, undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in expected]


def test_a_finished_run_is_not_run_again(make: Any, undisturbed: CheckpointRecord):
    job = make("undisturbed")
    assert train(job, lambda message: pytest.fail(f"it ran again: {message}")) == undisturbed


def test_only_the_newest_states_are_kept(store: Store, make: Any, alone: None):
    job = make("states", steps=9, save_every=1)
    run(job)
    kept = [entry.key for entry in store.list(f"{job.prefix}/states/")]
    assert [key.rpartition("/")[2] for key in kept] == ["00000007.json", "00000008.json"]
    assert len(list(store.list(f"{job.prefix}/state/"))) == 2


def test_micro_batches_give_the_same_model(store: Store, make: Any, undisturbed: CheckpointRecord, tmp_path: Path):
    whole = weights(store, undisturbed, tmp_path / "a")
    parts = weights(store, run(make("micro", micro_batch=2)), tmp_path / "b")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)


def test_a_compiled_network_trains_to_the_same_model(
    store: Store, make: Any, undisturbed: CheckpointRecord, tmp_path: Path
):
    eager = weights(store, undisturbed, tmp_path / "a")
    compiled = weights(store, run(make("compiled", compile=True)), tmp_path / "b")
    assert all(torch.allclose(eager[name], compiled[name], atol=2e-4) for name in eager)
    assert any(not torch.equal(eager[name], compiled[name]) for name in eager)  # it was another program


def test_the_average_without_memory_is_the_weights_and_with_it_lags(
    store: Store, make: Any, alone: None, tmp_path: Path
):
    follows = weights(store, run(make("ema-0", ema={"decay": 0.0})), tmp_path / "a")
    lags = weights(store, run(make("ema-9", ema={"decay": 0.999})), tmp_path / "b")
    start = weights(store, run(make("start", optim={"lr": 1e-12}, ema={"decay": 0.0})), tmp_path / "c")
    moved = sum(float((follows[name] - start[name]).abs().sum()) for name in start)
    lagged = sum(float((lags[name] - start[name]).abs().sum()) for name in start)
    assert moved > 0
    assert lagged < 0.02 * moved


def test_a_stage_starts_from_the_average_of_the_one_before(
    store: Store, make: Any, undisturbed: CheckpointRecord, tmp_path: Path
):
    # Without a learning rate nothing moves, so what comes out is what it started from, text encoder and all.
    still = run(make("next", start_from=undisturbed, optim={"lr": 1e-12}, ema={"decay": 0.0}))
    before, after = (weights(store, record, tmp_path / str(k)) for k, record in enumerate((undisturbed, still)))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert still.start_from == undisturbed.digest()
    assert after.keys() == before.keys()


def test_another_shape_to_start_from_is_refused_by_name(make: Any, undisturbed: CheckpointRecord):
    wider = {**small_run.MODEL, "field_channels": 16}
    with pytest.raises(CheckpointError, match=r"does not fit: .*field.* is \[\d"):
        run(make("misfit", start_from=undisturbed, model=wider))


def test_features_of_another_width_are_refused(make: Any, alone: None):
    with pytest.raises(SettingsError, match="32 wide, the network expects 48"):
        run(make("width", model={**small_run.MODEL, "text_dim": 48}))


def test_a_loss_that_is_not_finite_stops_the_run(make: Any, alone: None):
    with pytest.raises(TrainingError, match="not finite near step"):
        run(make("diverged", optim={"lr": 1e30, "clip": 0.0}))


def test_alignment_learns_this_image_and_not_the_average_one(store: Store, make: Any, alone: None):
    settings = {"steps": 240, "batch": 16, "log_every": 20, "save_every": 240, "optim": {"lr": 3e-3}}
    first, *_, last = curve(store, run(make("repa", **settings)))
    assert last["repa/cosine"] > last["repa/cosine_shuffled"] + 0.02
    assert last["repa/cosine"] > first["repa/cosine"]


def test_a_damaged_state_is_not_resumed_from(store: Store, make: Any, alone: None):
    job = make("damaged")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    state = checkpoint.newest_state(store, job.prefix)
    assert state is not None
    data = bytearray(store.get(state.files[0].data.key))
    data[-1] ^= 1
    store.put(state.files[0].data.key, bytes(data))
    with pytest.raises(DataError, match="do not have the hash"):
        run(job)


def test_what_was_trained_draws_the_same_picture_twice(store: Store, undisturbed: CheckpointRecord, tmp_path: Path):
    artist = Artist.load(checkpoint.fetch(store, undisturbed, tmp_path / "checkpoint"))
    settings = SampleSettings(steps=3, batch=2)
    prompts, seeds = ["a red circle", "two squares", "a red circle"], [0, 1, 5]
    together = artist.draw(prompts, seeds, settings)
    assert together.shape == (3, 16, 16, 3)
    apart = artist.draw(prompts[2:], seeds[2:], SampleSettings(steps=3, batch=1))
    assert abs(together[2].astype(int) - apart[0]).max() <= 1
    assert (together[0] != together[2]).any(), "another seed is another picture"


@pytest.mark.timeout(240)
def test_two_ranks_give_what_one_gives_and_one_resumes_what_two_began(
    store: Store, make: Any, undisturbed: CheckpointRecord, ray_cluster: str, tmp_path: Path
):
    from training.ray_train import fit

    seen: list[dict[str, Any]] = []
    two = fit(make("two", workers=2), seen.append)
    assert [message["step"] for message in seen if message["event"] == "log"] == [1, 2, 3, 4, 5, 6]
    whole, parts = weights(store, undisturbed, tmp_path / "1"), weights(store, two, tmp_path / "2")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)

    # The two ranks' state at step 3, found by a run of one rank.
    state = checkpoint.newest_state(store, "training/two")
    assert state is not None
    assert len(state.files) == 2
    began = replace(make("began"), prefix="training/began")
    checkpoint.write_record(store, f"{began.prefix}/states/00000003.json", state)
    resumed = weights(store, run(began), tmp_path / "3")
    assert all(torch.allclose(parts[name], resumed[name], atol=2e-4) for name in parts)

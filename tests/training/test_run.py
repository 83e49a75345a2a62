"""A training run's laws: stopped and resumed it gives the same bytes, on other ranks the same model."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from infra.claim import held
from infra.config import canonical_json, parse
from infra.errors import CheckpointError, DataError, SettingsError, Stopped, StoreError, TakenOver, TrainingError
from infra.records import CheckpointRecord, DataObject, SnapshotRecord, get_data, put_data, read_record
from infra.store import FileStore, Store
from tests.training import small_run
from training import checkpoint, loop, states, step
from training import model as models
from training.diffusion import draws, objective
from training.ema import Ema
from training.job import Job
from training.leftovers import collect_states
from training.loader import reader
from training.loop import train
from training.networks import build, fetch
from training.sampling import Artist, SampleSettings
from training.settings import TrainSettings
from training.team import Team


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    return FileStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def snapshot(store: Store, tmp_path_factory: pytest.TempPathFactory) -> SnapshotRecord:
    return small_run.write_data(tmp_path_factory.mktemp("data") / "corpus", store)


@pytest.fixture(scope="module")
def encoders(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, DataObject]]:
    return small_run.write_encoders(tmp_path_factory.mktemp("encoders"), store)


@pytest.fixture
def make(store: Store, snapshot: SnapshotRecord, encoders: Any) -> Any:
    return lambda name, **changes: small_run.job_in(store, snapshot, encoders, name, **changes)


class Killed(Exception):
    pass


class Unpublished(FileStore):
    """No checkpoint is taken, so that the states which led to it stay."""

    def create(self, key: str, data: bytes | Path) -> bool:
        if key.endswith("/checkpoint.json"):
            raise StoreError("the store is full", remedy="make room")
        return super().create(key, data)


class Keeps(FileStore):
    """Nothing is deleted, so that the states which led to a checkpoint stay."""

    def delete(self, key: str) -> None: ...


def run(job: Job, kill_after: int | None = None) -> CheckpointRecord:
    """Trains; with `kill_after` it breaks off behind the state committed at that step, as a kill would."""

    def say(message: dict[str, Any]) -> None:
        if message["event"] == "saved" and message["step"] == kill_after:
            raise Killed

    return train(job, say)


def newest(store: Store, job: Job) -> tuple[str, states.TrainingState]:
    """The key of the job's newest state, and the state, which must be there and whole."""
    found = states.newest(store, job.prefix)
    assert found is not None and found.state is not None
    return found.key, found.state


def weights(store: Store, record: CheckpointRecord, folder: Path) -> dict[str, torch.Tensor]:
    return models.load(checkpoint.fetch(store, record, folder)).state_dict()


def curve(store: Store, record: CheckpointRecord) -> list[dict[str, Any]]:
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


def committed(store: Store, job: Job) -> list[int]:
    """The steps of the committed states, each of them whole."""
    found = [read_record(store, e.key, states.TrainingState) for e in store.list(f"{job.prefix}/states/")]
    parts = {entry.key for entry in store.list(f"{job.prefix}/state/")}
    assert parts == {file.data.key for state in found for file in state.files}
    return [state.step for state in found]


def test_only_the_newest_states_are_kept_and_none_of_a_finished_run(store: Store, make: Any, alone: None):
    job = make("states", steps=9, save_every=1)
    with pytest.raises(Killed):
        run(job, kill_after=7)
    assert committed(store, job) == [6, 7]
    run(job)
    assert committed(store, job) == []


def test_micro_batches_give_the_same_model(store: Store, make: Any, undisturbed: CheckpointRecord, tmp_path: Path):
    whole = weights(store, undisturbed, tmp_path / "a")
    parts = weights(store, run(make("micro", micro_batch=2)), tmp_path / "b")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)


@pytest.mark.slow
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


def test_in_bf16_a_stage_that_learns_nothing_moves_no_weight(
    store: Store, make: Any, undisturbed: CheckpointRecord, tmp_path: Path
):
    """Its masters are the fp32 weights that it starts from, not those rounded to bf16."""
    changes = {"precision": "bf16", "optim": {"lr": 1e-12}, "ema": {"decay": 0.0}, "steps": 2}
    still = run(make("bf16", start_from=undisturbed, **changes))
    before, after = (weights(store, record, tmp_path / str(k)) for k, record in enumerate((undisturbed, still)))
    assert all(torch.allclose(before[name], after[name], rtol=1e-6, atol=1e-10) for name in before)


def test_a_resumed_optimiser_is_as_pytorch_itself_loads_it(store: Store, make: Any, alone: None, tmp_path: Path):
    """A fused one keeps its count of steps beside the weights; PyTorch moves it there, and so must a resume."""
    job = make("optimiser")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    parts = build(job.settings, fetch(job, tmp_path))
    engine = loop._shard(parts, job.settings, 1)
    assert states.resume(store, job.prefix, Team(), engine, Ema(engine.masters, job.settings.ema), pytest.fail)
    inner = engine._zero.optimizer
    twin = torch.optim.AdamW([{"params": group["params"]} for group in inner.param_groups], fused=True)
    twin.load_state_dict(inner.state_dict())
    for master in engine.masters:
        ours, theirs = inner.state[master], twin.state[master]
        assert float(ours["step"]) == 3
        assert {k: (v.dtype, v.device) for k, v in ours.items()} == {k: (v.dtype, v.device) for k, v in theirs.items()}
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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


def poisoned(monkeypatch: pytest.MonkeyPatch, positions: range) -> None:
    """The time of these positions is no number, and so neither is what is made of their noise."""
    true = draws.draw

    def draw(seed: int, asked: list[int], *args: Any, **kwargs: Any) -> Any:
        drawn = true(seed, asked, *args, **kwargs)
        for row, position in enumerate(asked):
            if position in positions:
                drawn.t_B[row] = torch.nan
        return drawn

    monkeypatch.setattr(step, "draw", draw)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_without_a_finite_gradient_is_left_out_and_counted(
    store: Store, make: Any, alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
):
    poisoned(monkeypatch, range(17, 18))  # of the fifth step
    record = run(make(f"one-nan-{precision}", precision=precision, log_every=3))
    first, second = curve(store, record)
    assert (first["train/skipped_steps"], second["train/skipped_steps"]) == (None, 1)
    assert all(torch.isfinite(tensor).all() for tensor in weights(store, record, tmp_path).values())


def test_a_broken_run_goes_back_to_its_last_state_and_past_what_broke_it(
    store: Store, make: Any, alone: None, monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    poisoned(monkeypatch, range(16, 20))  # of the fifth step; the state is of the third
    job = make("broken", save_every=3)
    record = train(job, lambda message: told.append(message["text"]) if message["event"] == "told" else None)
    assert told == [
        "the loss or the gradient is not finite near step 5: back to step 3, and past the batches since then"
    ]
    assert (record.step, record.position) == (6, 32)  # two steps were for nothing
    assert [row["images"] for row in curve(store, record)] == [4, 8, 12, 24, 28, 32]


def test_where_a_run_went_back_to_is_in_its_next_state(
    store: Store, make: Any, alone: None, monkeypatch: pytest.MonkeyPatch
):
    poisoned(monkeypatch, range(8, 12))
    job = make("broken-told", save_every=1, steps=5)
    with pytest.raises(Killed):
        run(job, kill_after=4)
    _, state = newest(store, job)
    assert state.position == 20
    assert state.returns == (states.Return(at=3, to=2, past=12),)


def test_images_that_do_not_decode_are_counted_and_named_and_a_resume_counts_them_alike(
    store: Store, make: Any, alone: None, monkeypatch: pytest.MonkeyPatch
):
    true = reader._decode

    def decode(data: bytes, out_HWC: Any) -> None:
        if hashlib.sha256(data).digest()[0] < 64:
            raise ValueError("it is worn out")
        true(data, out_HWC)

    monkeypatch.setattr(reader, "_decode", decode)
    told: list[str] = []
    record = train(make("worn"), lambda m: told.append(m["text"]) if m["event"] == "unreadable" else None)
    counted = [row["data/unreadable"] for row in curve(store, record)]
    assert 0 < sum(counted) < 24
    assert len(set(told)) == len(told) <= sum(counted)
    assert all("cannot be decoded (it is worn out)" in text for text in told)
    job = make("worn-killed")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    again = run(job)
    assert again.files["model.safetensors"].sha256 == record.files["model.safetensors"].sha256
    assert [row["data/unreadable"] for row in curve(store, again)] == counted


def test_a_shard_that_lost_a_bit_ends_the_run_before_a_state_is_committed(
    snapshot: SnapshotRecord, store: Store, make: Any, alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(reader, "_decode", lambda data, out_HWC: out_HWC.fill(128))  # no decoder finds this damage
    lost = FileStore(tmp_path / "store")
    assert isinstance(store, FileStore)
    shutil.copytree(store.root, lost.root, dirs_exist_ok=True)
    for entry in [e for e in lost.list("data/") if e.key.endswith(".tar")]:
        data = bytearray(lost.get(entry.key))
        data[5000] ^= 1
        lost.put(entry.key, bytes(data))
    job = replace(make("lost"), store=lost, cache=tmp_path / "cache")
    with pytest.raises(DataError, match="do not have the hash in its name"):
        run(job)
    assert committed(lost, job) == []
    assert checkpoint.published(lost, job.prefix) is None


def test_a_run_goes_back_so_often_and_then_ends(make: Any, alone: None, monkeypatch: pytest.MonkeyPatch):
    poisoned(monkeypatch, range(12, 1000))
    with pytest.raises(TrainingError, match="not finite near step 4, after 2 returns"):
        run(make("breaks", returns=2))


def test_a_loss_far_above_those_before_breaks_a_run(make: Any, alone: None, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    true = objective.velocity_loss

    def spiking(*args: Any) -> Any:
        calls.append(1)
        loss = true(*args)
        return loss._replace(per_sample_B=loss.per_sample_B * 50) if len(calls) == 12 else loss

    calls: list[int] = []
    monkeypatch.setattr(step, "velocity_loss", spiking)
    job = make("spike", spike=10, steps=14, save_every=2)
    record = train(job, lambda message: told.append(message["text"]) if message["event"] == "told" else None)
    assert told == [
        "the loss is more than 10 times that of the 10 log lines before near step 12: back to step 10,"
        " and past the batches since then"
    ]
    assert record.position == 64


def test_a_notice_that_machines_will_go_commits_a_state_once(make: Any, alone: None):
    saved: list[int] = []
    job = replace(make("noticed", save_every=6, log_every=2), ends_soon=lambda: True)
    train(job, lambda message: saved.append(message["step"]) if message["event"] == "saved" else None)
    assert saved == [2]


def test_a_stopped_run_commits_a_state_at_a_log_line_and_goes_on_from_there(
    store: Store, make: Any, undisturbed: CheckpointRecord
):
    job, said = make("stopped"), list[dict[str, Any]]()
    with pytest.raises(Stopped, match="stopped at step 1"):
        train(replace(job, stopped=lambda: True), said.append)
    assert committed(store, job) == [1]
    assert said[-1] == {"event": "stopped", "step": 1}
    resumed = run(replace(job, stopped=lambda: False))
    assert resumed.files["model.safetensors"].sha256 == undisturbed.files["model.safetensors"].sha256


def test_blocks_that_are_computed_anew_train_to_the_same_bytes(make: Any, undisturbed: CheckpointRecord):
    anew = run(make("anew", checkpointing="blocks"))
    for name in ("model.safetensors", "repa.safetensors", "text/model.safetensors"):
        assert anew.files[name].sha256 == undisturbed.files[name].sha256, name


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"checkpointing": 0}, "1 or more"), ({"compile": True, "zero": 3}, "set blocks")],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(SettingsError, match=told):
        parse(TrainSettings, small_run.SETTINGS | changes)
    assert parse(TrainSettings, small_run.SETTINGS | {"checkpointing": 2}).recomputed == 2


def test_no_state_is_committed_of_what_was_read_damaged(
    store: Store, make: Any, alone: None, monkeypatch: pytest.MonkeyPatch
):
    """Whole tars are waited for where states are written, which training does not wait for."""

    def damaged(self: reader.Reader) -> None:
        raise DataError("the tar is damaged", remedy="fetch it again")

    main, threads = threading.current_thread(), set()
    settle = reader.Reader.settle

    def watched(self: reader.Reader) -> None:
        threads.add(threading.current_thread() is main)
        settle(self)

    with monkeypatch.context() as patch:
        patch.setattr(reader.Reader, "settle", watched)
        run(make("settled", save_every=2))
    assert threads == {True, False}  # once more at the end
    monkeypatch.setattr(reader.Reader, "settle", damaged)
    job = make("unsettled", save_every=2)
    with pytest.raises(DataError, match="the tar is damaged"):
        run(job)
    assert committed(store, job) == []


def test_states_at_certain_steps_are_kept_for_good(store: Store, make: Any, alone: None):
    job = make("kept", steps=6, save_every=1, keep=1, keep_every=2)
    run(job)
    assert committed(store, job) == [2, 4]
    assert collect_states(store, older_than_hours=-1).objects == 0
    assert committed(store, job) == [2, 4]


def test_alignment_learns_this_image_and_not_the_average_one(store: Store, make: Any, alone: None):
    settings = {"steps": 240, "batch": 16, "log_every": 20, "save_every": 240, "optim": {"lr": 3e-3}}
    first, *_, last = curve(store, run(make("repa", **settings)))
    assert last["repa/cosine"] > last["repa/cosine_shuffled"] + 0.02
    assert last["repa/cosine"] > first["repa/cosine"]


def test_a_damaged_state_is_not_resumed_from(store: Store, make: Any, alone: None):
    job = make("damaged")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    _, state = newest(store, job)
    data = bytearray(store.get(state.files[0].data.key))
    data[-1] ^= 1
    store.put(state.files[0].data.key, bytes(data))
    with pytest.raises(CheckpointError, match=r"every training state .*do not have the hash"):
        run(job)
    store.delete(state.files[0].data.key)
    with pytest.raises(CheckpointError, match=r"every training state .*there is no object"):
        run(job)


@pytest.mark.parametrize("damage", ["part flipped", "part missing", "record cut"])
def test_behind_a_damaged_state_the_one_before_is_resumed_from_and_it_is_told(
    store: Store,
    make: Any,
    undisturbed: CheckpointRecord,
    damage: str,
):
    job = make(f"older-{damage.replace(' ', '-')}", save_every=1)
    with pytest.raises(Killed):
        run(job, kill_after=3)
    key, state = newest(store, job)
    part = state.files[0].data.key
    if damage == "part flipped":
        data = store.get(part)
        store.put(part, data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "part missing":
        store.delete(part)
    else:
        store.put(key, store.get(key)[:-9])
    said: list[dict[str, Any]] = []
    record = train(job, said.append)
    assert [message["step"] for message in said if message["event"] == "start"] == [2]
    assert [key in message["text"] for message in said if message["event"] == "told"] == [True]
    assert record.files["model.safetensors"].sha256 == undisturbed.files["model.safetensors"].sha256


def in_one_vector(job: Job, file: states.StateFile, names: list[str]) -> dict[str, Any]:
    """A part as schemas 1 and 2 had it: each kind is a range of one vector, in which all parameters lie end to end."""
    tensors = safetensors.torch.load(get_data(job.store, file.data))
    vectors = {
        f"{kind}.0": torch.cat([tensors[f"{kind}/{name}"] for name in names])
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema")
    }
    data = put_data(job.store, f"{job.prefix}/state", "00000003-00000.safetensors", safetensors.torch.save(vectors))
    ranges = {name: (0, len(vector)) for name, vector in vectors.items()}
    return {"data": data.model_dump(mode="json"), "ranges": ranges, "schema_version": 1}


def test_a_state_of_an_earlier_version_is_resumed_from(
    store: Store, make: Any, undisturbed: CheckpointRecord, tmp_path: Path
):
    job = make("earlier")
    parts = build(job.settings, fetch(job, tmp_path))
    names = [name for name, parameter in parts.trained.named_parameters() if parameter.requires_grad]
    with pytest.raises(Killed):
        run(job, kill_after=3)
    key, state = newest(store, job)
    old = {name: value for name, value in state.model_dump(mode="json").items() if name != "attempt"}
    old |= {"schema_version": 1, "files": [in_one_vector(job, state.files[0], names)]}
    store.delete(key)
    store.put(f"{job.prefix}/states/00000003.json", json.dumps(old).encode())
    assert run(job).files["model.safetensors"].sha256 == undisturbed.files["model.safetensors"].sha256


def test_a_state_of_mixed_parts_can_be_neither_written_nor_read(store: Store, make: Any, alone: None):
    job = make("mixed")
    with pytest.raises(Killed):
        run(job, kill_after=3)
    key, state = newest(store, job)
    for change in ({"step": 2}, {"attempt": "another"}):
        mixed = [*state.files, state.files[0].model_copy(update=change)]
        with pytest.raises(ValueError, match="several steps or attempts"):
            states.TrainingState(**state.model_dump(exclude={"files"}), files=mixed)
        store.put(key, canonical_json(state.model_copy(update={"files": mixed})).encode())
        with pytest.raises(CheckpointError, match="every training state"):
            run(job)


def test_a_driver_whose_run_was_taken_over_commits_nothing(store: Store, make: Any, alone: None):
    job = make("taken")
    with held(store, job.prefix, lambda: False, pytest.fail) as claim:
        assert claim is not None
        store.put(f"{job.prefix}/drivers/000002.json", store.get(claim.key).replace(claim.driver.encode(), b"b" * 12))
        with pytest.raises(TakenOver):
            run(replace(job, claim=claim))
    assert not list(store.list(f"{job.prefix}/states/"))
    assert checkpoint.published(store, job.prefix) is None


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
    store: FileStore, make: Any, undisturbed: CheckpointRecord, ray_cluster: str, tmp_path: Path
):
    from training.ray_train import fit

    seen: list[dict[str, Any]] = []
    job = make("two", workers=2)
    two = fit(replace(job, store=Keeps(store.root)), seen.append)
    assert [message["step"] for message in seen if message["event"] == "log"] == [1, 2, 3, 4, 5, 6]
    whole, parts = weights(store, undisturbed, tmp_path / "1"), weights(store, two, tmp_path / "2")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)

    # A run of one rank goes on from the two ranks' state.
    store.delete(f"{job.prefix}/checkpoint.json")
    _, state = newest(store, job)
    assert (state.step, len(state.files)) == (3, 2)
    resumed = weights(store, run(replace(job, settings=make("two").settings)), tmp_path / "3")
    assert all(torch.allclose(parts[name], resumed[name], atol=2e-4) for name in parts)


@pytest.mark.slow
def test_an_error_of_the_last_step_reaches_the_driver_and_its_states_are_resumed_from(
    store: FileStore, make: Any, undisturbed: CheckpointRecord, ray_cluster: str, tmp_path: Path
):
    from training.ray_train import fit

    began = make("began", workers=2, retries=0)
    with pytest.raises(StoreError, match="the store is full"):
        fit(replace(began, store=Unpublished(store.root)), lambda message: None)
    _, state = newest(store, began)
    assert len(state.files) == 2
    resumed = weights(store, run(replace(began, settings=make("began").settings)), tmp_path / "2")
    whole = weights(store, undisturbed, tmp_path / "1")
    assert all(torch.allclose(whole[name], resumed[name], atol=2e-4) for name in whole)


def test_lean_encoders_train_resume_and_are_published_as_they_were(
    store: Store, make: Any, encoders: dict[str, dict[str, DataObject]], alone: None
):
    """In bf16 and without pads; captions of the small corpus are longer than four tokens."""
    lean = {"encoder_precision": "bf16", "pack_text": True, "train_text": 0}
    lean["model"] = {**small_run.MODEL, "text_tokens": 4}
    told: list[str] = []
    straight = train(make("lean", **lean), lambda m: told.append(m["text"]) if m["event"] == "truncated" else None)
    broken = make("lean-killed", **lean)
    with pytest.raises(Killed):
        run(broken, kill_after=3)
    resumed = run(broken)
    assert resumed.files["model.safetensors"].sha256 == straight.files["model.safetensors"].sha256
    counted = sum(row["data/truncated_captions"] for row in curve(store, straight))
    assert straight.truncated_captions == resumed.truncated_captions == counted
    assert 0 < counted <= straight.position
    assert [text for text in told if "longer than 4 tokens" in text] == told != []
    before = safetensors.torch.load(get_data(store, encoders["text"]["model.safetensors"]))
    after = safetensors.torch.load(get_data(store, straight.files["text/model.safetensors"]))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_layers_of_the_text_encoder_learn_at_their_own_rate(
    store: Store, make: Any, encoders: dict[str, dict[str, DataObject]], alone: None, share: float
):
    record = run(make(f"text-lr-{share}", optim={"lr": 1e-3, "text_lr": share}, pack_text=True, ema={"decay": 0.0}))
    before = safetensors.torch.load(get_data(store, encoders["text"]["model.safetensors"]))
    after = safetensors.torch.load(get_data(store, record.files["text/model.safetensors"]))
    assert all(torch.equal(before[name], after[name]) for name in before) == (share == 0)

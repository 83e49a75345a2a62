"""The loss on held-out samples: always of the same ones, and without a trace in what is trained."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from infra.errors import SettingsError
from infra.records import CheckpointRecord, SnapshotRecord, get_data
from infra.store import FileStore
from tests.training import small_run
from training.job import Job
from training.loop import train
from training.perf import peak
from training.validation import draw_evenly


@pytest.fixture(scope="module")
def world(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs on one rank, and a snapshot; most runs hold its samples out."""
    folder = tmp_path_factory.mktemp("validation")
    store = FileStore(folder / "store")
    snapshot = small_run.write_data(folder / "corpus", store)
    held = snapshot.model_copy(update={"held_out": snapshot.selection, "held_out_rows": snapshot.rows})
    encoders = small_run.write_encoders(folder / "encoders", store)

    def job(name: str, data: SnapshotRecord = held, **changes: Any) -> Job:
        return small_run.job_in(store, data, encoders, name, **changes)

    return job, snapshot


def curve(job: Job, record: CheckpointRecord) -> list[dict[str, Any]]:
    assert record.curve is not None
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(get_data(job.store, record.curve))).to_pylist()
    return rows


def hashes(record: CheckpointRecord) -> dict[str, str]:
    return {name: file.sha256 for name, file in record.files.items()}


def run(job: Job) -> tuple[CheckpointRecord, list[dict[str, Any]]]:
    record = train(job, lambda message: None)
    return record, curve(job, record)


def test_validation_leaves_no_trace_in_what_is_trained(world: Any):
    job, _ = world
    with_it, rows = run(job("with", validation={"every": 2, "batches": 3}))
    without, plain = run(job("without"))
    assert hashes(with_it) == hashes(without)
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in plain]
    validated = [row["step"] for row in rows if row["val/loss"] is not None]
    assert validated == [2, 4, 6]
    assert "val/loss" not in plain[0]


def test_weights_that_do_not_change_have_the_same_loss_at_every_step(world: Any):
    job, _ = world
    settings = {"optim": {"lr": 1e-30}, "objective": {"repa": 0.0}, "train_text": 0}
    _, rows = run(job("still", validation={"every": 1, "batches": 5}, **settings))
    columns = [name for name in rows[0] if name.startswith("val/")]
    assert len(columns) == 11  # every bin of time has samples
    for column in columns:
        assert len({row[column] for row in rows}) == 1
    assert len({row["train/loss"] for row in rows}) > 1
    assert rows[0]["val/loss"] == pytest.approx(np.mean([rows[0][name] for name in columns if "_t" in name]), rel=0.2)


def test_a_snapshot_that_holds_nothing_out_is_refused(world: Any):
    job, snapshot = world
    with pytest.raises(SettingsError, match="the snapshot holds no samples out"):
        train(job("nothing", snapshot, validation={"every": 2}), lambda message: None)


def test_times_are_spread_evenly():
    times = draw_evenly(0, range(1000), (3, 4, 4)).t_B
    counts = torch.histc(times, 10, 0, 1)
    assert counts.sum() == 1000
    assert (counts - 100).abs().max() <= 2
    some = draw_evenly(0, range(3, 9), (3, 4, 4))
    assert torch.equal(some.t_B, times[3:9])
    assert not some.drop_B.any()


def test_the_share_of_the_peak_is_told_where_a_peak_is(world: Any):
    job, _ = world
    _, rows = run(job("peak", peak_tflops=0.001))
    for row in rows:
        assert row["perf/mfu"] == pytest.approx(row["perf/tflops"] / 0.001)
        assert row["perf/memory_gib"] > 0.01
    assert peak(0, "bf16", torch.device("cpu")) is None


def test_gpus_are_known_by_what_their_driver_calls_them():
    from training.plan.machines import device_called

    for name, known in {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-40GB": "A100-80",  # as fast, and no memory is read from it
        "NVIDIA GeForce RTX 4090": "RTX4090",
        "NVIDIA L40S": "L40S",
    }.items():
        device = device_called(name)
        assert device is not None
        assert device.name == known
    assert device_called("Tesla T4") is None

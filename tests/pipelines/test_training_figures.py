"""What a training run's ranks have to say reaches MLflow through the driver, wherever they run."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.config import parse
from infra.records import SnapshotOutput, SnapshotRecord, put_data, write_record
from infra.store import open_store
from infra.tracking import Tracker
from pipelines.stages import train as stages
from pipelines.stages.base import Context
from tests.infra.stage_records import record_of
from training import ray_train

SETTINGS = {"preset": "tiny", "data": "data", "text_encoder": "none", "steps": 30, "batch": 4}


def test_the_driver_logs_what_rank_0_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "_text_width", lambda *given: 96)

    def fit(job: Any, show: Any) -> Any:
        """What the real one does, without ranks: the job travels, and messages come back."""
        job = pickle.loads(pickle.dumps(job))
        show({"event": "start", "step": 0, "steps": 30})
        for step in (10, 20, 30):
            row = {"train/loss": 1 / step, "perf/images_per_second": 5.0, "perf/data_wait": 0.1}
            job.run.metrics(row, step)  # goes nowhere: this machine may not see the database
            show({"event": "log", "step": step, "steps": 30, "images": 4 * step, **row})
            show({"event": "saved", "step": step})
        return SimpleNamespace(parameters=7, position=120)

    monkeypatch.setattr(ray_train, "fit", fit)
    store = open_store(str(tmp_path))
    data = put_data(store, "x", "rows", b"")
    names = {"selection": data, "held_out": data, "by_shard": data}
    counts = {"rows": 1, "held_out_rows": 0, "counts": [], "by_source": {}, "caption_shares": {}, "forgotten": []}
    write_record(store, "snapshot.json", SnapshotRecord(shards="s", size="24", **names, **counts))
    output = SnapshotOutput(record="snapshot.json", rows=1, counts=[], size="24")
    inputs = {"data": record_of(output)}
    with closing(Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test", tmp_path / "artifacts")) as tracker:
        run = tracker.run("train", "d")
        context = Context(store, tmp_path, tracker, run, lambda stage, said: None, digest="d", run=run)
        stages.train(context, parse(stages.TrainStage, SETTINGS), inputs)
        assert run.flush(240)

        from mlflow import MlflowClient

        client = MlflowClient(tracker.uri)
        for name, values in {"train/loss": [0.1, 0.05, 1 / 30], "train/images": [40.0, 80.0, 120.0]}.items():
            found = client.get_metric_history(run.run_id, name)
            assert [(metric.step, metric.value) for metric in found] == list(zip((10, 20, 30), values, strict=True))
        made = client.get_run(run.run_id)
        assert not {"step", "steps", "event", "images"} & made.data.metrics.keys()
        assert made.inputs.dataset_inputs[0].dataset.name == "snapshot-24"

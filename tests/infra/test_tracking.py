"""MLflow on SQLite: nested runs that are found again, metrics that arrive, failures that stop nothing."""

from __future__ import annotations

import fcntl
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from infra import tracking
from infra.tracking import Run, Tracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    folder = tmp_path_factory.mktemp("mlflow")
    return Tracker(f"sqlite:///{folder}/mlflow.db", "test", folder / "artifacts")


def client(tracker: Tracker):
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri)


OPENS = """
import sys
import mlflow
from infra.tracking import Tracker

print("ready", flush=True)
sys.stdin.read()
tracker = Tracker(sys.argv[1], "test")
print(tracker.run("a", sys.argv[2]).run_id)
"""


def test_two_processes_that_open_a_fresh_database_at_once_both_log(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", OPENS, uri, name], **pipes) for name in ("one", "two")]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.close()
        process.stdin = None
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    ids = [out.strip() for out, _ in said]
    assert len({*ids, "None"}) == 3, said
    tracker = Tracker(uri, "test")
    assert [tracker.run("a", name).run_id for name in ("one", "two")] == ids


def test_a_file_that_is_no_database_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "mlflow.db").write_bytes(b"no database, but long enough to be read as one" * 100)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")
        assert tracker.run("a", "b").run_id is None
    assert [r.message for r in caplog.records if r.name == "infra.tracking"] == [
        "MLflow did not take a call and the work goes on without it ((sqlite3.DatabaseError) file is not a database)"
    ]


def test_a_lock_whose_holder_hangs_stops_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_LOCK_SECONDS", 0.3)
    with (tmp_path / "mlflow.db.lock").open("ab") as held, caplog.at_level(logging.WARNING):
        fcntl.flock(held, fcntl.LOCK_EX)
        tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")
        assert tracker.run("a", "b").run_id is None
    assert [r.message for r in caplog.records if r.name == "infra.tracking"] == [
        "MLflow did not take a call and the work goes on without it "
        f"(another process still holds {tmp_path}/mlflow.db.lock after 0.3 s)"
    ]


def test_a_stage_is_nested_and_found_again(tracker: Tracker):
    parent = tracker.run("workflow", "w")
    stage = tracker.run("train", "a", parent)
    found = client(tracker).get_run(stage.run_id)
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    assert tracker.run("train", "a", parent).run_id == stage.run_id
    assert tracker.run("train", "b", parent).run_id != stage.run_id


def test_metrics_arrive_also_from_a_worker(tracker: Tracker):
    run = pickle.loads(pickle.dumps(tracker.run("metrics", "m")))
    for step in range(30):
        run.metrics({"train/loss": 1 / (step + 1), "repa/cosine": 0.5}, step)
    run.end()
    history = client(tracker).get_metric_history(run.run_id, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(s, 1 / (s + 1)) for s in range(30)]
    assert client(tracker).get_run(run.run_id).info.status == "FINISHED"


def test_data_and_scores_make_a_lineage(tracker: Tracker, tmp_path: Path):
    run = tracker.run("lineage", "l")
    run.dataset("snapshot-32", "abc", "file:///store/snapshots/abc.json", {"rows": 7}, "training")
    run.params({"optim.lr": 1e-3})
    version = tracker.register("model", "champion", run, "file:///store/c", {"k": "v"}, {"geneval/overall": 0.7})
    made = client(tracker).get_model_version_by_alias("model", "champion")
    assert (str(made.version), made.source, made.run_id) == (version, "file:///store/c", run.run_id)
    found = client(tracker).get_run(run.run_id)
    assert found.data.metrics["geneval/overall"] == 0.7
    assert found.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert found.data.params["optim.lr"] == "0.001"


def test_registering_again_after_a_kill_makes_no_second_version(tracker: Tracker):
    run = tracker.run("killed", "k")
    first = tracker.register("once", "champion", run, "s3://a/1", {}, {})
    assert tracker.register("once", "champion", run, "s3://a/1", {}, {}) == first
    assert len(client(tracker).search_model_versions("name='once'")) == 1


def test_another_run_makes_a_second_version_that_takes_the_alias(tracker: Tracker):
    first = tracker.register("twice", "champion", tracker.run("again", "1"), "s3://a/1", {}, {})
    second = tracker.register("twice", "champion", tracker.run("again", "2"), "s3://a/2", {}, {})
    assert first != second
    assert client(tracker).get_model_version_by_alias("twice", "champion").source == "s3://a/2"


def test_a_server_that_is_down_stops_nothing_and_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("http://127.0.0.1:9", "test")
        run = tracker.run("a", "b")
        run.metrics({"x": 1.0}, 0)
        run.params({"y": 2})
        run.end()
        assert tracker.register("m", "champion", run, "s3://a", {}, {}) is None
    assert len([r for r in caplog.records if r.name == "infra.tracking"]) == 1


def test_without_a_run_nothing_is_logged():
    run = Run("http://127.0.0.1:9", None)
    run.metrics({"x": 1.0}, 0)
    run.end()

"""MLflow on SQLite: nested runs that are found again, metrics that arrive, and work that waits for none of it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from infra import calls, notices, scratch, tracking
from infra.errors import TrackingError
from infra.tracking import NOWHERE, Measured, Model, Run, Tracker, Version

LONG = 240.0  # seconds for what takes one or two where nothing else runs
SECRET = "keep-this-to-yourself"


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notices, "_last", {})
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.1)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracker]:
    folder = tmp_path_factory.mktemp("mlflow")
    with closing(Tracker(f"sqlite:///{folder}/mlflow.db", "test", folder / "artifacts")) as tracker:
        known(tracker.run("the first", "0"))  # opens the file: two threads of one process cannot make its tables
        yield tracker


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def client(tracker: Tracker):
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri)


def model(checkpoint: str) -> Model:
    return Model("sft: 1.5", checkpoint, f"s3://a/{checkpoint}", "data")


def known(run: Run) -> str:
    assert run.flush(LONG)
    assert run.run_id is not None
    return run.run_id


def experiment_of(tracker: Tracker, run: Run) -> str:
    return str(client(tracker).get_run(known(run)).info.experiment_id)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "infra.notices"]


OPENS = """
import sys
import mlflow
from infra.tracking import Tracker

print("ready", flush=True)
sys.stdin.read()
tracker = Tracker(sys.argv[1], "test")
run = tracker.run("a", sys.argv[2])
run.flush(240)
print(run.run_id)
tracker.close()
"""


def test_two_processes_that_open_a_fresh_database_at_once_both_log(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", OPENS, uri, name], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for name in ("one", "two")
    ]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    said = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    ids = [out.strip() for out, _ in said]
    assert len({*ids, "None"}) == 3, said
    with closing(Tracker(uri, "test")) as tracker:
        assert [known(tracker.run("a", name)) for name in ("one", "two")] == ids


def test_a_kill_while_the_tables_are_made_leaves_nothing_broken(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    opening = subprocess.Popen([sys.executable, "-c", OPENS, uri, "one"], stdin=subprocess.DEVNULL)
    try:
        while scratch.size(tmp_path) < 300_000:  # of some 950,000
            assert opening.poll() is None
    finally:
        opening.kill()
        opening.wait()
    with closing(Tracker(uri, "test")) as tracker:
        assert known(tracker.run("a", "one"))
    assert not list(tmp_path.glob("*.new*"))


def test_a_file_that_is_no_database_stops_nothing_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "mlflow.db").write_bytes(b"no database, but long enough to be read as one" * 100)
    with closing(Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")) as tracker:
        run = tracker.run("a", "b")
        run.metrics({"x": 1.0}, 0)
        assert run.flush(LONG)
        with pytest.raises(TrackingError, match=r"did not take the model \(file is not a database\)"):
            tracker.register("m", "champion", run, model("a"), "")
    assert told(caplog) == [
        f"MLflow at {tmp_path}/mlflow.db refuses a call (file is not a database); the work goes on without it"
    ]


def test_another_process_that_opens_the_file_is_waited_for_by_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_LOCK_SECONDS", 0.1)
    with (tmp_path / "mlflow.db.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")
        run = tracker.run("a", "b")
        while not told(caplog):
            assert not run.flush(0.01)
    assert known(run)
    tracker.close()
    assert told(caplog) == [
        f"MLflow at {tmp_path}/mlflow.db does not answer "
        f"(another process still holds {tmp_path}/mlflow.db.lock after 0.1 s); the work goes on, and what it logs waits"
    ]


def test_a_stage_is_nested_and_found_again(tracker: Tracker):
    parent = tracker.run("workflow", "w")
    stage = tracker.run("train", "a", parent)
    found = client(tracker).get_run(known(stage))
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    assert known(tracker.run("train", "a", parent)) == stage.run_id
    others = [tracker.run("train", "b", parent), tracker.run("it's", "a", parent)]
    assert len({stage.run_id, *map(known, others)}) == 3


def history(tracker: Tracker, run: Run, name: str = "train/loss") -> list[tuple[int, float]]:
    """As it was logged: steps in their order, each once."""
    found = client(tracker).get_metric_history(known(run), name)
    return [(metric.step, metric.value) for metric in found]


CURVE = [(step, 1 / (step + 1)) for step in range(250)]


def test_metrics_arrive_all_and_in_order(tracker: Tracker):
    run = tracker.run("metrics", "m")
    for step, loss in CURVE:
        run.metrics({"train/loss": loss, "repa/cosine": 0.5}, step)
    run.end()
    assert history(tracker, run) == CURVE
    assert client(tracker).get_run(run.run_id).info.status == "FINISHED"


def test_a_locked_database_holds_up_nothing_and_loses_nothing(tracker: Tracker):
    run = tracker.run("locked", "l")
    path = Path(tracker.uri.removeprefix("sqlite:///"))
    known(run)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for step, loss in CURVE:
            run.metrics({"train/loss": loss}, step)
        run.end()
        assert not run.flush(0.01)  # all this was said while nobody could write a word
        other.execute("ROLLBACK")
    assert history(tracker, run) == CURVE


def test_a_server_that_never_answers_holds_up_nothing_and_the_loss_is_told(
    silent: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calls, "STUCK_AFTER", 0.1)
    monkeypatch.setattr(tracking, "_CLOSE_AWAY_SECONDS", 0.2)
    tracker = Tracker(silent, "test")
    run = tracker.run("a", "b")
    for step, loss in CURVE:
        run.metrics({"train/loss": loss}, step)
    assert not run.flush(0.01)
    run.end()
    tracker.close()
    assert told(caplog) == [
        f"MLflow at {silent} did not get 252 of the things logged (no answer in time); "
        "the records in the store hold the results"
    ]


def test_nobody_waits_for_long_at_a_save_or_at_the_end():
    assert tracking._FLUSH_SECONDS <= 1
    assert tracking._CLOSE_AWAY_SECONDS + calls.STUCK_AFTER < tracking._CLOSE_SECONDS <= 15


def test_a_server_that_is_down_stops_nothing_and_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_REGISTER_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "_CLOSE_AWAY_SECONDS", 0.1)
    tracker = Tracker(f"http://me:{SECRET}@127.0.0.1:9", "test")
    run = tracker.run("a", "b")
    run.metrics({"x": 1.0}, 0)
    run.params({"y": 2})
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 did not take the model \(.*refused.*MLFLOW_TRACKING_URI"):
        tracker.register("m", "champion", run, model("a"), "")
    run.end()
    tracker.close()
    # A thread of an earlier test may still be waiting for its server, and tell that this server is gone.
    waits, lost = [text for text in told(caplog) if text.startswith("MLflow at http://127.0.0.1:9 ")]
    assert waits.startswith("MLflow at http://127.0.0.1:9 does not answer (")
    assert "4 of the things logged" in lost
    assert SECRET not in caplog.text


def test_data_and_scores_make_a_lineage(tracker: Tracker, tmp_path: Path):
    run = tracker.run("lineage", "l")
    run.dataset("snapshot-32", "abc", "file:///store/snapshots/abc.json", {"rows": 7}, "training")
    run.params({"optim.lr": 1e-3})
    before = dict(os.environ)
    version = tracker.register("model", "champion", run, model("c"), "scores well")
    assert dict(os.environ) == before, "processes that are started later would find this tracker's URI"
    made = client(tracker).get_model_version_by_alias("model", "champion")
    assert (str(made.version), made.run_id) == (version, run.run_id)
    assert made.tags == {"pixnerd.checkpoint": "c", "pixnerd.source": "s3://a/c", "pixnerd.snapshot": "data"}
    assert made.description == "scores well"
    found = client(tracker).get_run(run.run_id)
    assert found.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert found.data.params["optim.lr"] == "0.001"


def test_all_that_measures_a_checkpoint_logs_to_its_model(tracker: Tracker):
    of_geneval, of_dpg, other = (tracker.run("scores", name) for name in ("g", "d", "o"))
    of_geneval.scores(model("one"), Measured("geneval-prompts", "12"), {"geneval/overall": 0.7}, 500)
    of_dpg.scores(model("one"), Measured("dpg-prompts", "34"), {"dpg/overall": 0.8}, 500)
    other.scores(model("two"), Measured("dpg-prompts", "34"), {"dpg/overall": 0.2}, 900)
    registered = tracker.register("measured", "champion", tracker.run("registers", "r"), model("one"), "")
    experiment = experiment_of(tracker, other)
    query = "tags.`pixnerd.checkpoint` = 'one'"
    [found] = client(tracker).search_logged_models([experiment], query)
    assert {(m.key, m.value, m.step, m.dataset_name, m.dataset_digest) for m in found.metrics} == {
        ("geneval/overall", 0.7, 500, "geneval-prompts", "12"),
        ("dpg/overall", 0.8, 500, "dpg-prompts", "34"),
    }
    run = client(tracker).get_run(of_dpg.run_id)
    assert run.data.metrics == {"dpg/overall": 0.8}
    assert [(data.dataset.name, data.dataset.digest) for data in run.inputs.dataset_inputs] == [("dpg-prompts", "34")]
    assert [each.model_id for each in run.inputs.model_inputs] == [found.model_id]
    version = client(tracker).get_model_version("measured", registered)
    assert version.source == f"models:/{found.model_id}"


def test_the_version_that_has_an_alias_is_told(tracker: Tracker):
    assert tracker.version_of("unknown", "champion") is None
    number = tracker.register("asked", "champion", tracker.run("asked", "a"), model("one"), "")
    assert tracker.version_of("asked", "champion") == Version(number, "one")
    assert tracker.version_of("asked", "challenger") is None


def test_a_table_has_its_pictures(tracker: Tracker, tmp_path: Path):
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(png, "PNG")
    run = tracker.run("table", "t")
    run.table("verdicts.json", {"prompt": ["a red square"], "picture": [png.getvalue()]})
    known(run)
    table = json.loads(Path(client(tracker).download_artifacts(run.run_id, "verdicts.json", str(tmp_path))).read_text())
    assert table["columns"] == ["prompt", "picture"]
    [[prompt, picture]] = table["data"]
    assert prompt == "a red square"
    shown = client(tracker).download_artifacts(run.run_id, picture["filepath"], str(tmp_path))
    assert Image.open(shown).getpixel((0, 0)) == (255, 0, 0)


def test_what_a_version_points_at_is_what_a_server_accepts(tracker: Tracker):
    from mlflow.exceptions import MlflowException
    from mlflow.server.handlers import _validate_source_model

    tracker.register("accepted", "champion", tracker.run("accepted", "a"), model("c"), "")
    made = client(tracker).get_model_version_by_alias("accepted", "champion")
    _validate_source_model(made.source, made.source.removeprefix("models:/"))
    with pytest.raises(MlflowException, match="Invalid model version source"):
        _validate_source_model("/store/c", "")


def test_registering_again_after_a_kill_makes_no_second_version(tracker: Tracker):
    run = tracker.run("killed", "k")
    first = tracker.register("once", "champion", run, model("1"), "")
    assert tracker.register("once", "champion", run, model("1"), "") == first
    assert len(client(tracker).search_model_versions("name='once'")) == 1


def test_another_run_makes_a_second_version_that_takes_the_alias(tracker: Tracker):
    first = tracker.register("twice", "champion", tracker.run("again", "1"), model("1"), "")
    second = tracker.register("twice", "champion", tracker.run("again", "2"), model("2"), "")
    assert first != second
    made = client(tracker).get_model_version_by_alias("twice", "champion")
    assert made.tags["pixnerd.source"] == "s3://a/2"


def test_without_a_tracker_nothing_is_logged():
    run = pickle.loads(pickle.dumps(NOWHERE))
    run.metrics({"x": 1.0}, 0)
    run.end()
    assert run.flush()


def test_a_run_does_not_travel_to_where_its_database_may_not_be_seen(tracker: Tracker):
    with pytest.raises(TypeError, match="only the driver logs"):
        pickle.dumps(tracker.run("travels", "t"))

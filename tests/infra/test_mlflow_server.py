"""A real `mlflow server`, started as its manual says, beside a store on disk: well, away, and of another opinion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from infra import calls, notices
from infra.errors import TrackingError
from infra.tracking import Measured, Model, Run, Tracker
from tests.infra.fault_proxy import Fault, FaultProxy
from tests.infra.outside import mlflow_server

pytestmark = pytest.mark.slow

LONG = 240.0
CURVE = [(step, 1 / (step + 1)) for step in range(250)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with mlflow_server() as url:
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    with FaultProxy(server.removeprefix("http://")) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notices, "_last", {})
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.5)


def client(server: str):
    from mlflow import MlflowClient

    return MlflowClient(server)


def logged(server: str, run: Run) -> list[tuple[int, float]]:
    assert run.flush(LONG)
    return [(metric.step, metric.value) for metric in client(server).get_metric_history(run.run_id, "train/loss")]


MODEL = Model("sft-1", "abc", "file:///store/c", "data")


def test_a_store_in_a_folder_is_registered_and_nothing_is_printed(
    server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    source = (tmp_path / "training" / "checkpoint.json").as_uri()
    page = tmp_path / "report.html"
    page.write_text("<p>a page")
    with closing(Tracker(server, "test")) as tracker:
        parent = tracker.run("workflow", "w")
        run = tracker.run("register", "r", parent)
        run.scores(MODEL, Measured("geneval-prompts", "12"), {"geneval/overall": 0.7}, 1)
        parent.artifact(page)
        version = tracker.register("model", "champion", run, MODEL._replace(source=source), "")
        run.end()
        parent.end()
    made = client(server).get_model_version_by_alias("model", "champion")
    assert (made.version, made.tags["pixnerd.source"], made.run_id) == (version, source, run.run_id)
    assert [client(server).get_run(one.run_id).info.status for one in (run, parent)] == ["FINISHED"] * 2
    assert [found.path for found in client(server).list_artifacts(parent.run_id)] == ["report.html"]
    assert capfd.readouterr().out == ""


def test_what_it_says_to_a_registration_is_told(server: str):
    with closing(Tracker(server, "test")) as tracker:
        run = tracker.run("refused", "r")
        with pytest.raises(TrackingError, match=f"MLflow at {server} did not take the model .*name.*a/b"):
            tracker.register("a/b", "champion", run, MODEL, "")


@pytest.mark.parametrize("fault", ["drop", "lost answer", (503, "Unavailable")], ids=str)
def test_what_it_did_not_hear_it_hears_later_and_what_it_heard_twice_counts_once(
    server: str, proxy: FaultProxy, fault: Fault
):
    with closing(Tracker(proxy.url, "test")) as tracker:
        run = tracker.run(f"away: {fault}", "a")
        assert run.flush(LONG)
        for step, loss in CURVE[:10]:
            run.metrics({"train/loss": loss}, step)
        proxy.spoil(fault, "POST", "log-batch", times=3)
        for step, loss in CURVE[10:]:
            run.metrics({"train/loss": loss}, step)
        assert logged(server, run) == CURVE
    assert proxy.unused() == 0


def test_a_run_whose_beginning_was_not_answered_is_begun_once(server: str, proxy: FaultProxy):
    proxy.spoil("lost answer", "POST", "runs/create")
    with closing(Tracker(proxy.url, "test")) as tracker:
        parent = tracker.run("begun", "b")
        assert parent.flush(LONG)
        again = tracker.run("begun", "b")
        assert again.flush(LONG)
        found = client(server).search_runs([tracker._experiment_id], "tags.`pixnerd.digest` = 'b'")
    assert [one.info.run_id for one in found] == [parent.run_id] == [again.run_id]


def test_a_server_that_hangs_for_a_while_loses_nothing(server: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with closing(Tracker(proxy.url, "test")) as tracker:
        run = tracker.run("hangs", "h")
        assert run.flush(LONG)
        proxy.away = "hang"
        before = len(proxy.requests)
        for step, loss in CURVE:
            run.metrics({"train/loss": loss}, step)
        while len(proxy.requests) < before + 2:  # the first has been given up
            assert not run.flush(0.1)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        proxy.away = None
        proxy.released.set()
        assert logged(server, run) == CURVE

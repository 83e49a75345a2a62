"""One stage as a command, and what the store's records tell of runs: to whoever has its URL, at once."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from infra import layout
from infra.claim import PATIENCE_SECONDS
from infra.errors import DataError, NotNow, NotPromoted, SettingsError, StageFailed
from infra.records import Output, write_record
from infra.store import Store
from infra.tracking import NOWHERE
from orchestration import history, launch, stage_log, workflow
from orchestration.commands.status import explain, logs, status
from orchestration.lease import Driver, Lease, this_driver
from orchestration.stage_log import StageLog
from orchestration.status import Runs
from pipelines.stages.base import Context, Progress, StageKind
from tests.orchestration.test_workflow import (
    Made,
    MakeOutput,
    NoTracker,
    TellOutput,
    failing,
    gated,
    kinds,
    ran,
    recipe,
    store,
)

__all__ = ["gated", "kinds", "ran", "store"]  # fixtures


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def context_of(store: Store, *_: Any) -> Iterator[Context]:
        yield Context(store, Path(), NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "context_of", context_of)


class Command:
    """`pixnerd run` and `pixnerd stage`, of a recipe in a file."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.path, self.store = folder / "mine.yaml", store

    def write(self, **stages: dict[str, Any]) -> None:
        made = recipe(**stages)
        self.path.write_text(yaml.safe_dump({"name": "mine", "stages": made.stages}))

    def stage(self, name: str) -> None:
        launch.stage(str(self.path), name, store=self.store.url, assignments=[], address=None, as_json=True)

    def run(self) -> None:
        launch.run(str(self.path), store=self.store.url, assignments=[], address=None, dry_run=False, as_json=True)

    def node(self, name: str) -> workflow.Node:
        from pipelines import recipes

        return next(node for node in workflow.graph(recipes.load(str(self.path)), self.store) if node.name == name)


@pytest.fixture
def command(tmp_path: Path, store: Store) -> Command:
    return Command(tmp_path, store)


def test_a_stage_is_done_once_what_it_needs_is_there(command: Command, ran: list[str]):
    command.write(a={}, b={"above": "a"})
    with pytest.raises(NotNow, match="`b` needs a") as caught:
        command.stage("b")
    assert caught.value.exit_code == 75
    for name in ("a", "b", "b", "a"):
        command.stage(name)
    assert ran == ["a", "b"]
    with pytest.raises(SettingsError, match="no stage `c`"):
        command.stage("c")


def test_a_stage_that_another_driver_has_is_not_done_now(
    command: Command, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    command.write(a={})
    other = Driver(command.store).take("a", "make", command.node("a").digest)
    assert isinstance(other, Lease)
    beats = iter(range(100))
    # Between two looks the other one's heartbeat goes on.
    pause = lambda driver, seconds: command.store.put(f"{other.key}{layout.BEAT}", str(next(beats)).encode())  # noqa: E731
    monkeypatch.setattr(Driver, "pause", pause, raising=False)
    monkeypatch.setattr(launch, "Driver", lambda store, run: Driver(store, run, pause=lambda s: pause(None, s)))
    with pytest.raises(NotNow, match=r"@.* \(process \d+, since .* is at work on the stage `a`"):
        command.stage("a")
    assert ran == [] and Runs(command.store).names == []
    other.give_up("stopped", "")
    command.stage("a")
    assert ran == ["a"]


def test_a_stage_of_a_driver_that_is_never_heard_of_is_taken_over(
    command: Command, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    command.write(a={})
    assert isinstance(Driver(command.store).take("a", "make", command.node("a").digest), Lease)
    clock = [0.0]

    def pause(seconds: float) -> None:
        clock[0] += PATIENCE_SECONDS / 2

    monkeypatch.setattr(launch, "Driver", lambda store, run: Driver(store, run, clock=lambda: clock[0], pause=pause))
    command.stage("a")
    assert ran == ["a"]
    [told, _] = Runs(command.store).explain("a").attempts
    assert told.end is not None and told.end.how == "taken over"


def test_behind_a_closed_gate_a_stage_is_not_promoted(
    command: Command, ran: list[str], gated: dict[str, dict[str, Any]]
):
    command.write(**{**gated, "gate": {"kind": "judge", "value": -1}})
    command.stage("gate")
    with pytest.raises(NotPromoted, match="the gate `gate` is closed") as caught:
        command.stage("publish")
    assert caught.value.exit_code == 3
    command.stage("all")
    assert ran == ["all of gate"]
    command.run()
    assert ran == ["all of gate"]


def test_what_reads_all_waits_for_the_others_but_not_for_those_that_failed(
    command: Command, ran: list[str], kinds: dict[str, StageKind]
):
    command.write(a={"value": -1}, b={"above": "a"}, c={"value": 3}, all={"kind": "tell"})
    with pytest.raises(StageFailed, match="it is negative") as caught:
        command.stage("a")
    assert caught.value.exit_code == 1
    with pytest.raises(NotNow, match="`all` needs c:"):
        command.stage("all")
    command.stage("c")
    command.stage("all")
    assert ran == ["a", "c", "all"]


# Telling


def test_status_tells_of_each_stage(command: Command, ran: list[str], capsys: pytest.CaptureFixture[str]):
    command.write(a={"value": 1}, b={"value": -1}, c={"above": "b"}, d={"above": "a"}, _e={"above": "d"})
    with pytest.raises(StageFailed):
        command.run()
    capsys.readouterr()
    status(command.store.url, last=5, json_=True)
    [told] = json.loads(capsys.readouterr().out)
    assert told["state"] == "failed" and "the stage `b` failed" in told["why"]
    assert {name: stage["state"] for name, stage in told["stages"].items()} == {
        "a": "done",
        "b": "failed",
        "c": "skipped",
        "d": "done",
        "_e": "done",
    }
    assert list(told["stages"]) == ["a", "d", "_e", "b", "c"], "each after those that it reads"
    assert told["recipe"]["stages"]["b"]["value"] == -1
    status(command.store.url, last=5, json_=False)
    text = capsys.readouterr().out
    assert "mine  failed - the stage `b` failed: it is negative: be positive" in text
    assert "    c              skipped    needs b" in text


def test_a_run_whose_record_is_damaged_hides_no_other(
    command: Command, ran: list[str], capsys: pytest.CaptureFixture[str]
):
    command.write(a={"value": 1})
    command.run()
    command.store.put(layout.RUN.at(run="99991231-235959-damaged"), b"{")
    capsys.readouterr()
    status(command.store.url, last=5, json_=True)
    assert [run["state"] for run in json.loads(capsys.readouterr().out)] == ["done"]
    explain("a", command.store.url, json_=True)
    assert json.loads(capsys.readouterr().out)["state"] == "done"


def test_explain_says_what_was_changed_and_logs_where_it_failed(
    command: Command, ran: list[str], kinds: dict[str, StageKind], capsys: pytest.CaptureFixture[str]
):
    stages: dict[str, Any] = {"a": {"value": 1}, "b": {"above": "a"}, "c": {"above": "b"}}
    command.write(**stages)
    command.run()
    command.write(**{**stages, "a": {"value": 2}})
    kinds["make"] = StageKind("make", Made, failing)
    with pytest.raises(StageFailed):
        command.run()
    kinds["make"] = StageKind("make", Made, lambda context, settings, inputs: MakeOutput(sum=1))
    command.run()
    runs = Runs(command.store)
    first, second, third = runs.names
    assert runs.explain("a").reason == f"changed since the run {first}: value 1 -> 2"
    assert runs.explain("c").reason == f"what it reads is not as it was in the run {first}: b"
    assert runs.explain("a", run=first).reason == "no earlier run has done other work in its place"
    assert runs.explain("b", run=second).now.state == "skipped"
    capsys.readouterr()
    explain("a", command.store.url)
    text = capsys.readouterr().out
    assert f"in the run {third} of `mine`" in text
    assert "attempt 1 by " in text and "failed 20" in text and "the disk is full: make room" in text
    assert "attempt 2 by " in text and ": committed 20" in text
    logs("a", command.store.url)
    assert capsys.readouterr().out.splitlines()[-1].endswith("UTC  finished")
    logs("a", command.store.url, attempt=1)
    assert 'raise DataError("the disk is full", remedy="make room")' in capsys.readouterr().out
    with pytest.raises(DataError, match="no such attempt: it has 1, 2"):
        logs("a", command.store.url, attempt=3)
    with pytest.raises(SettingsError, match="has a, b, c"):
        explain("x", command.store.url)
    with pytest.raises(SettingsError, match="there is no run yesterday"):
        explain("a", command.store.url, run="yesterday")


def test_while_a_stage_is_at_work_the_store_tells_so(command: Command, kinds: dict[str, StageKind]):
    seen: list[Any] = []

    def look(context: Context, settings: Made, inputs: Any) -> Output:
        runs = Runs(context.store)
        seen.extend(runs.look(runs.newest(1)))
        return MakeOutput(sum=0)

    kinds["make"] = StageKind("make", Made, look)
    kinds["tell"] = StageKind("tell", Made, lambda context, settings, inputs: TellOutput(sum=0), reads_all=True)
    command.write(a={}, all={"kind": "tell"})
    command.run()
    [now] = seen
    assert now.state == "running"
    assert now.stages["a"].state == "running" and f"(process {os.getpid()}, " in now.stages["a"].why
    assert now.stages["all"].state == "not begun"


def test_a_run_that_was_killed_is_told_of_as_silent(command: Command, ran: list[str]):
    command.write(a={})
    run = history.begun(
        history.new_run(),
        "mine",
        {},
        {"a": history.StageOfRun(kind="make", digest_of_work="d", settled=True, done=False, inputs={}, settings={})},
    )
    write_record(command.store, layout.RUN.at(run=run.run), run)
    runs = Runs(command.store)
    [now] = runs.look(runs.newest(1))
    assert (now.state, now.stages["a"].state) == ("silent", "not begun")


def test_where_one_workflow_has_run_its_store_need_not_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="which store is meant: write --store with a folder or s3"):
        status()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    status(last=1)
    assert capsys.readouterr().out == f"no run is recorded in file://{tmp_path}/runs/one\n"
    (tmp_path / "runs" / "two").mkdir()
    with pytest.raises(SettingsError, match="write --store with one of runs/one, runs/two"):
        status()


def test_a_log_keeps_its_beginning_and_its_end_and_is_sent_now_and_then(store: Store, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(stage_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = StageLog(store, "log.txt")
    log.line("first")
    log.send()
    log.line("second")
    log.send()
    assert b"second" not in store.get("log.txt")
    now[0] += stage_log.SEND_SECONDS
    log.send()
    assert b"second" in store.get("log.txt")
    for number in range(40):
        now[0] += 4
        log.progress(Progress(f"step {number}"))
    for number in range(stage_log.LONGEST // 100):
        log.line(f"{number} {'x' * 100}")
    with log.listening():
        logging.lastResort.handle(logging.makeLogRecord({"levelno": 30, "levelname": "WARNING", "msg": "beware"}))  # type: ignore[union-attr]
    text = store.get("log.txt").decode()
    assert text.count("  step ") == 14  # each ten seconds, and the last one
    assert "first" in text and "\n...\n" in text and text.endswith("  warning: beware\n")
    assert len(text) <= stage_log.LONGEST


def test_no_password_of_a_url_is_written_down(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/bin/pixnerd", "run", "x", "--set", "tracking.uri=http://me:hunter2@host"])
    run = history.begun("r", "mine", {"tracking": {"uri": "http://me:hunter2@host"}, "stages": [1]}, {})
    assert "hunter2" not in run.model_dump_json() and "http://host" in run.model_dump_json()


@pytest.mark.slow
def test_in_a_store_of_a_thousand_runs_the_answer_takes_two_seconds(store: Store, tmp_path: Path):
    names = [f"stage{number}" for number in range(12)]
    for number in range(1000):
        stages = {
            name: history.StageOfRun(
                kind="make",
                digest_of_work=f"{number:04x}{place:04x}",
                settled=True,
                done=False,
                inputs={"above": names[place - 1]} if place else {},
                settings={"value": number, "more": "x" * 1000},
            )
            for place, name in enumerate(names)
        }
        run = f"20260101T{number:06d}-abcdef"
        record = history.WorkflowRun(
            **this_driver(),
            run=run,
            workflow="mine",
            command=[],
            recipe={},
            git="",
            version="0",
            order=names,
            stages=stages,
        )
        ends = {
            name: history.StageEnd(kind="make", digest_of_work=stage.digest_of_work, event="finished", text="")
            for name, stage in stages.items()
        }
        write_record(store, layout.RUN.at(run=run), record)
        write_record(store, layout.RUN_END.at(run=run), history.RunEnd(state="done", at="", stages=ends))
        for name, stage in stages.items():
            settled = history.RunStage(stage=name, kind="make", digest_of_work=stage.digest_of_work, reused=False)
            write_record(store, layout.RUN_STAGE.at(run=run, stage=name), settled)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for arguments in (["status"], ["explain", "stage11"], ["explain", "stage11", "--workflow", "mine"]):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        told = subprocess.run(
            [sys.executable, "-m", "orchestration.cli", *arguments, "--store", store.url],
            cwd=empty, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert told.returncode == 0, told.stderr
        # CPU time is bounded, as other work on the machine delays the clock; on an idle one both are nearly the same.
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{' '.join(arguments)}: {seconds:.2f} s of the processors, {time.perf_counter() - began:.2f} s in all")
        assert seconds < 2.0
    assert "value 998 -> 999" in told.stdout
    assert list(empty.iterdir()) == []

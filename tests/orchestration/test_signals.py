"""A workflow that is stopped, or that loses its Ray, ends soon, with one line, and leaves no process and no folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from infra.guard import STOPPED
from tests.orchestration.small_recipe import RECIPE

SECONDS = 20.0  # that it may take to stop


class Ended(NamedTuple):
    code: int
    seconds: float
    errors: list[str]  # the lines that are no progress
    out: str


class Run:
    """A running command; its processes are known by a mark in their environment."""

    def __init__(self, *arguments: str | Path, before: str = "") -> None:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "orchestration.cli", *map(str, arguments)]
        if before:
            command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
        environment = {**os.environ, "PIXNERD_TEST_MARK": self.mark}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    def until(self, words: str) -> None:
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            seen.append(line)
            if words in line:
                return
        pytest.fail(f"it ended before `{words}`: {seen}")

    def pids(self, name: str = "") -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                named = (folder / "comm").read_text().strip() == name or not name
                if named and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def end(self) -> Ended:
        began = time.monotonic()
        out, err = self.process.communicate(timeout=120)
        told = [line for line in err.splitlines() if line.strip() and ":" not in line[:4]]
        return Ended(self.process.returncode, time.monotonic() - began, told, out)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    return tmp_path / "t"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: what the first has come to, those after it need not make again."""
    return tmp_path_factory.mktemp("signals") / "store"


@pytest.fixture
def started(tmp_path: Path, store: Path, temporary: Path) -> Iterator[Callable[..., Run]]:
    """Starts the workflow in small; what a test leaves running is killed."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    runs: list[Run] = []

    def start(*more: str, before: str = "") -> Run:
        runs.append(Run("run", recipe, "--store", store, "--set", "low.steps=4000", *more, before=before))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()


@contextmanager
def nothing_left(run: Run, temporary: Path) -> Iterator[None]:
    yield
    assert run.pids() == []
    assert [path.name for path in temporary.glob("pixnerd-*")] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_can_be_stopped_at_every_stage(started: Callable[..., Run], temporary: Path):
    asked = {
        "": signal.SIGTERM,  # while Ray starts
        "> prepare ": signal.SIGTERM,
        "> encoders ": signal.SIGINT,
        "> low ": signal.SIGTERM,  # while the ranks start
        "  low: step": signal.SIGINT,
    }
    for words, number in asked.items():
        run = started()
        if words:
            run.until(words)
        else:
            while not run.pids("gcs_server"):
                assert run.process.poll() is None
                time.sleep(0.05)
        with nothing_left(run, temporary):
            run.process.send_signal(number)
            ended = run.end()
            # On a busy machine MLflow may not have taken everything by then, which is told as well.
            errors = [line for line in ended.errors if not line.startswith("MLflow at ")]
            assert (ended.code, errors, ended.out) == (128 + number, [STOPPED], ""), words
            assert ended.seconds < SECONDS, words


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_that_is_killed_is_told_of(started: Callable[..., Run], temporary: Path, name: str):
    run = started()
    run.until("  low: step")
    with nothing_left(run, temporary):
        os.kill(run.pids(name)[0], signal.SIGKILL)
        ended = run.end()
        assert (ended.code, len(ended.errors), ended.out) == (1, 1, "")
        assert name in ended.errors[0] and "run the same command again" in ended.errors[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_too_little_address_space_is_told_of(started: Callable[..., Run], temporary: Path):
    run = started(before="ulimit -v 3000000")
    with nothing_left(run, temporary):
        ended = run.end()
        assert (ended.code, len(ended.errors), ended.out) == (1, 1, "")
        assert "ulimit -v" in ended.errors[0] and "internal" not in ended.errors[0]

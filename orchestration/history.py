"""Runs of workflows, as their records tell of them: what each was to do, what it has come to, and how it has ended.

    workflows/begun/<run>.json            the recipe as it was resolved, who runs it where, and its stages
    workflows/stages/<run>/<stage>.json   what the run has settled of a stage: the digest of its work
    workflows/ended/<run>.json            how the run has ended, and each stage in it
    running/<run>.json, .beat             see running.py; a run is at work while its heartbeat goes on

Beside them lie the attempts at the stages: see lease.py. `status.py` tells what all of these say.
"""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from infra import layout
from infra.causes import explained, first_line
from infra.errors import PixnerdError, Stopped
from infra.records import Plain, Record, write_record
from infra.store import Store
from infra.text import masked
from orchestration.lease import Who, now, this_driver


class StageOfRun(Plain):
    kind: str
    digest_of_work: str  # as far as it was known when the run began
    settled: bool  # whether it could not change any more
    done: bool  # before the run began
    inputs: dict[str, str]  # the setting that names a stage -> that stage
    settings: dict[str, Any]  # those that change results


class WorkflowRun(Who, Record):
    run: str
    workflow: str
    command: list[str]
    recipe: dict[str, Any]  # as it was resolved
    git: str  # commit of the code, with `-dirty` if it was changed; empty if it is not in a repository
    version: str
    order: list[str]  # of the stages, each after those that it reads
    stages: dict[str, StageOfRun]


class RunStage(Record):
    stage: str
    kind: str
    digest_of_work: str
    reused: bool


class StageEnd(Plain):
    kind: str
    digest_of_work: str
    event: str  # "finished", "reused", "failed", "skipped", or what it was at when the run was stopped
    text: str


class RunEnd(Record):
    state: Literal["done", "failed", "stopped"]
    why: str = ""
    at: str
    stages: dict[str, StageEnd]


def new_run() -> str:
    """A name for a run; those of later runs sort after it, as far as clocks agree."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S-%f}-{uuid.uuid4().hex[:4]}"


def begun(run: str, workflow: str, recipe: Mapping[str, Any], stages: Mapping[str, StageOfRun]) -> WorkflowRun:
    from importlib.metadata import version

    return WorkflowRun(
        **this_driver(),
        run=run,
        workflow=workflow,
        command=[Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
        recipe=_masked_values(recipe),
        git=_git(),
        version=version("pixnerd"),
        order=list(stages),
        stages=dict(stages),
    )


def _masked_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked_values(inner) for inner in value]
    return masked(value) if isinstance(value, str) else value


def _git() -> str:
    """The commit of this code. A wheel is of no repository, even if it is installed inside of one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    return ""


class Journal:
    """Writes down what a run comes to. A store that cannot be written stops no run for this alone."""

    def __init__(self, store: Store, run: WorkflowRun) -> None:
        self.store, self.run = store, run
        self.stages: dict[str, StageEnd] = {}

    def note(self, stage: str, kind: str, digest: str, event: str, text: str) -> None:
        self.stages[stage] = StageEnd(kind=kind, digest_of_work=digest, event=event, text=text)
        known = self.run.stages.get(stage)
        was_known = known is not None and known.settled and known.done
        if event in ("running", "reused") and not was_known:
            settled = RunStage(stage=stage, kind=kind, digest_of_work=digest, reused=event == "reused")
            with suppress(PixnerdError):
                write_record(self.store, layout.RUN_STAGE.at(run=self.run.run, stage=stage), settled)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The run's record is written before the body, and that of its end after it."""
        with suppress(PixnerdError):
            write_record(self.store, layout.RUN.at(run=self.run.run), self.run)
        try:
            yield
        except BaseException as error:
            stopped = not isinstance(error, Exception) or isinstance(explained(error), Stopped)
            why = "" if stopped else str(explained(error) or f"{type(error).__name__}: {first_line(error)}")
            self._end("stopped" if stopped else "failed", why)
            raise
        self._end("done")

    def _end(self, state: Literal["done", "failed", "stopped"], why: str = "") -> None:
        with suppress(PixnerdError):
            end = RunEnd(state=state, why=masked(why), at=now(), stages=self.stages)
            write_record(self.store, layout.RUN_END.at(run=self.run.run), end)

"""What a stage of a workflow is: its settings, what it may use, and the function that does its work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.config import Settings
from infra.problems import Wrong
from infra.records import (
    CheckpointRecord,
    EvalReport,
    EvaluateOutput,
    Output,
    SnapshotOutput,
    SnapshotRecord,
    StageRecord,
    TrainOutput,
    read_record,
)
from infra.store import Store
from infra.tracking import NOWHERE, Run, Tracker

Inputs = Mapping[str, StageRecord]
Below = Mapping[str, Any]  # `data` or `scored.0` -> the settings of the stage that it names, which is of the right kind


@dataclass(frozen=True)
class Progress:
    """How far a stage is: what a terminal draws as a bar and a log file gets as a line now and then."""

    text: str
    done: int = 0
    total: int = 0
    own: float = 0.0  # the part of all that this run did, where it tells: others may work beside it


@dataclass(frozen=True)
class Context:
    """What a stage may use: the store, a folder of this machine, the tracker, and somebody who listens."""

    store: Store
    home: Path
    tracker: Tracker
    parent: Run
    show: Callable[[str, Progress], None]
    stage: str = ""
    digest: str = ""
    run: Run = NOWHERE

    def for_stage(self, stage: str, kind: str, of: str) -> Context:
        run = self.tracker.run(stage, of, self.parent, {"pixnerd.kind": kind})
        return replace(self, stage=stage, digest=of, run=run)

    def progress(self, text: str, done: int = 0, total: int = 0, own: float = 0.0) -> None:
        self.show(self.stage, Progress(text, done, total, own))


def stage_reference(default: Any = ...) -> Any:
    """A setting that names another stage. The name itself changes no result: that stage's digest does."""
    return Field(default, json_schema_extra={"operational": True, "stage": True})


def references(settings: Settings) -> dict[str, str]:
    """`field` or `field.number` -> the stage that it names."""
    found: dict[str, str] = {}
    for name, info in type(settings).model_fields.items():
        if not (isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("stage")):
            continue
        value = getattr(settings, name)
        if isinstance(value, str):
            found[name] = value
        elif value is not None:
            found |= {f"{name}.{number}": target for number, target in enumerate(value)}
    return found


@dataclass(frozen=True)
class StageKind:
    name: str
    settings: type[Settings]
    work: Callable[[Context, Any, Inputs], Output]
    references: Callable[[Any], dict[str, str]] = references
    # What the stage reads that no setting tells, such as hashes of files. It is given the records of the stages that
    # this one names, as far as those are done.
    outside: Callable[[Any, Store | None, Inputs], Any] = lambda settings, store, inputs: None
    # What is wrong beside the settings of the stages that it names, found before any work begins.
    check: Callable[[Any, Below], Iterable[Wrong]] = lambda settings, below: ()
    # A setting that names stages -> the kind that they must be.
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: int = 1  # raised when the same settings and inputs would come to something else
    reads_all: bool = False  # it reads every other stage of the workflow, those that failed left out


def snapshot_of(store: Store, stage: StageRecord) -> SnapshotRecord:
    return read_record(store, stage.of(SnapshotOutput).record, SnapshotRecord)


def checkpoint_of(store: Store, stage: StageRecord) -> CheckpointRecord:
    return read_record(store, stage.of(TrainOutput).record, CheckpointRecord)


def report_of(store: Store, stage: StageRecord) -> EvalReport:
    return read_record(store, stage.of(EvaluateOutput).record, EvalReport)

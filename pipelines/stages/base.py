"""What a stage of a workflow is: its settings, the context it works in, and the function that does its work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.actors import Needs, PoolSettings
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
# What a stage refers to, such as `data` or `scored.0` -> the settings of that stage, whose kind has been checked.
Below = Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far a stage is. A terminal draws it as a bar, a log file gets a line of it now and then."""

    text: str
    done: int = 0
    total: int = 0
    own: float = 0.0  # share of the total that this run did itself, if known; other runs may work on the same stage


@dataclass(frozen=True)
class Context:
    """What a stage may use: the store, a local folder, the tracker, and a callback that shows progress.

    Whatever cannot be undone, and is seen by others before the stage's record is there, follows a `check_held`.
    """

    store: Store
    home: Path
    tracker: Tracker
    parent: Run
    show: Callable[[str, Progress], None]
    stage: str = ""
    digest: str = ""
    run: Run = NOWHERE
    check_held: Callable[[], None] = lambda: None  # raises TakenOver if another driver has taken the stage over

    def for_stage(self, stage: str, kind: str, digest: str) -> Context:
        run = self.tracker.run(stage, digest, self.parent, {"pixnerd.kind": kind})
        return replace(self, stage=stage, digest=digest, run=run)

    def progress(self, text: str, done: int = 0, total: int = 0, own: float = 0.0) -> None:
        self.show(self.stage, Progress(text, done, total, own))


def stage_reference(default: Any = ...) -> Any:
    """A setting that names another stage. Results depend on that stage's digest, not on its name."""
    return Field(default, json_schema_extra={"operational": True, "stage": True})


def references(settings: Settings) -> dict[str, str]:
    """Setting -> the stage that it names: {"shards": "prepare", "scored.0": "clip"}."""
    targets: dict[str, str] = {}
    for name, info in type(settings).model_fields.items():
        if not (isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("stage")):
            continue
        value = getattr(settings, name)
        if isinstance(value, str):
            targets[name] = value
        elif value is not None:
            targets |= {f"{name}.{number}": target for number, target in enumerate(value)}
    return targets


def declared(settings: Any) -> Needs:
    """What the stage asks its cluster for: what its settings say, or one CPU."""
    return settings.needs if isinstance(settings, PoolSettings) else Needs(1)


@dataclass(frozen=True)
class StageKind:
    name: str
    settings: type[Settings]
    work: Callable[[Context, Any, Inputs], Output]
    references: Callable[[Any], dict[str, str]] = references
    # What results depend on besides the settings, such as hashes of local files; it is part of the stage's digest. The
    # inputs are the records of the stages that this one names, as far as those are done.
    outside: Callable[[Any, Store | None, Inputs], Any] = lambda settings, store, inputs: None
    # Mistakes that show only beside the settings of the stages that it names; they are told before any work begins.
    check: Callable[[Any, Below], Iterable[Wrong]] = lambda settings, below: ()
    # Setting that names stages -> the kind that those stages must be of, or the kinds that they may be of.
    takes: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    format: int = 1  # raised when the code would make other bytes of the same settings and inputs
    needs: Callable[[Any], Needs] = declared
    reads_all: bool = False  # it reads every other stage of the workflow that did not fail


def snapshot_of(store: Store, stage: StageRecord) -> SnapshotRecord:
    return read_record(store, stage.of(SnapshotOutput).record, SnapshotRecord)


def checkpoint_of(store: Store, stage: StageRecord) -> CheckpointRecord:
    return read_record(store, stage.of(TrainOutput).record, CheckpointRecord)


def report_of(store: Store, stage: StageRecord) -> EvalReport:
    return read_record(store, stage.of(EvaluateOutput).record, EvalReport)

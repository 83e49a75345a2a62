"""The stage that compares a checkpoint's pictures with real ones: FID and kin."""

from __future__ import annotations

import json

from infra import layout
from infra.records import CheckpointRecord, FidOutput, Output, SnapshotRecord, get_data
from infra.store import Store
from pipelines.evaluation.fid_run import FidSettings, Real, prompts_of
from pipelines.evaluation.fid_run import fid as measure
from pipelines.stages.base import Context, Inputs, StageKind, checkpoint_of, snapshot_of, stage_reference
from pipelines.stages.tracked import log_report


class FidStage(FidSettings):
    checkpoint: str = stage_reference()
    data: str | None = stage_reference(None)  # captions to draw, and the real pictures unless `reference` names others


def fid(context: Context, settings: FidStage, inputs: Inputs) -> Output:
    """A checkpoint -> FID, sFID, KID, precision, recall and the Inception Score."""
    store, checkpoint = context.store, checkpoint_of(context.store, inputs["checkpoint"])
    data = _data(store, inputs)
    prompts = prompts_of(store, data, classes_of(store, checkpoint), settings)
    report = measure(store, context.digest, checkpoint, prompts, Real(settings, data), context.progress)
    log_report(context, inputs["checkpoint"], report)
    return FidOutput(record=layout.REPORT.at(stage=context.digest), scores=report.values())


def classes_of(store: Store, checkpoint: CheckpointRecord) -> int | None:
    """How many labels the network draws from; None if it draws from text."""
    model = json.loads(get_data(store, checkpoint.files["config.json"]))["model"]
    return int(model["classes"]) if model["task"] == "class" else None


def _data(store: Store, inputs: Inputs) -> SnapshotRecord | None:
    return snapshot_of(store, inputs["data"]) if "data" in inputs else None


def _outside(settings: FidStage, store: Store | None, inputs: Inputs) -> object:
    """The network's weights and named real pictures; those of `data` count by that stage's own digest."""
    data = _data(store, inputs) if store is not None else None
    return Real(settings, data).identity() if settings.reference is not None or data is not None else None


KINDS = (StageKind("fid", FidStage, fid, outside=_outside, takes={"checkpoint": "train", "data": "snapshot"}),)

"""The stage that measures a checkpoint by DPG-Bench; a gate takes its scores as it takes GenEval's."""

from __future__ import annotations

import re

from infra import layout
from infra.records import DpgOutput, Output
from pipelines.evaluation.dpg_run import DpgSettings, outside
from pipelines.stages.base import Context, Inputs, StageKind, checkpoint_of, stage_reference
from pipelines.stages.tracked import log_report


class DpgStage(DpgSettings):
    checkpoint: str = stage_reference()


def evaluate(context: Context, settings: DpgStage, inputs: Inputs) -> Output:
    """A checkpoint -> DPG-Bench's scores in percent, with intervals. MLflow's names of them tell the judge."""
    from pipelines.evaluation.dpg_run import dpg

    checkpoint = checkpoint_of(context.store, inputs["checkpoint"])
    report = dpg(context.store, context.digest, checkpoint, settings, context.progress)
    log_report(context, inputs["checkpoint"], report, _metric)
    return DpgOutput(record=layout.REPORT.at(stage=context.digest), scores=report.values())


def _metric(score: str, judge: str) -> str:
    """`dpg/overall` by the judge `Qwen2.5-VL-7B-Instruct (likelier)` -> `dpg/Qwen2.5-VL-7B-Instruct likelier/overall`.

    Names come from files of questions and of models, and MLflow allows them no other letters than these.
    """
    protocol, _, name = score.partition("/")
    judge, name = (re.sub(r"[^A-Za-z0-9_. -]", "", text.replace("/", "-")) for text in (judge, name))
    return f"{protocol}/{judge}/{name}"


KINDS = (
    StageKind(
        "dpg",
        DpgStage,
        evaluate,
        outside=lambda settings, store, inputs: outside(settings),
        takes={"checkpoint": "train"},
    ),
)

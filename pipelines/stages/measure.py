"""Stages that measure a checkpoint: sample pictures, and GenEval's scores."""

from __future__ import annotations

from infra import layout
from infra.records import EvaluateOutput, Output, SampleOutput
from pipelines.evaluation.run import GenevalSettings, outside
from pipelines.sample import held_out
from pipelines.sample.held_out import DrawSettings
from pipelines.stages.base import Context, Inputs, StageKind, checkpoint_of, snapshot_of, stage_reference
from pipelines.stages.tracked import log_report


class SampleStage(DrawSettings):
    checkpoint: str = stage_reference()
    data: str = stage_reference()


def sample(context: Context, settings: SampleStage, inputs: Inputs) -> Output:
    """A checkpoint -> pictures for captions that training never saw, on the page and on a contact sheet."""
    checkpoint, data = checkpoint_of(context.store, inputs["checkpoint"]), snapshot_of(context.store, inputs["data"])
    drawn = held_out.draw(context.store, context.digest, checkpoint, data, settings, context.progress)
    path = context.home / f"{context.stage}.png"
    held_out.write_sheet(context.store, drawn, f"{inputs['checkpoint'].stage}, step {checkpoint.step:,}", path)
    context.run.artifact(path)
    record = layout.SAMPLES.at(stage=context.digest)
    return SampleOutput(record=record, sheet=str(path.absolute()), prompts=len(drawn.prompts))


class EvaluateStage(GenevalSettings):
    checkpoint: str = stage_reference()


def evaluate(context: Context, settings: EvaluateStage, inputs: Inputs) -> Output:
    """A checkpoint -> GenEval's six tasks with intervals."""
    from pipelines.evaluation.run import geneval

    checkpoint = checkpoint_of(context.store, inputs["checkpoint"])
    report = geneval(context.store, context.digest, checkpoint, settings, context.progress)
    log_report(context, inputs["checkpoint"], report)
    return EvaluateOutput(record=layout.REPORT.at(stage=context.digest), scores=report.values())


KINDS = (
    StageKind("sample", SampleStage, sample, takes={"checkpoint": "train", "data": "snapshot"}, format=2),
    StageKind(
        "evaluate",
        EvaluateStage,
        evaluate,
        outside=lambda settings, store, inputs: outside(settings),
        takes={"checkpoint": "train"},
        format=2,  # in 1 the pictures of several prompts were drawn in other batches, and their size did not count
    ),
)

"""The judge that settings name, with its networks on a device."""

from __future__ import annotations

from pipelines.evaluation.detector.settings import JudgeSettings
from pipelines.evaluation.judges import BatchJudge, OneByOne, ShapeJudge


def load(judge: JudgeSettings, device: str) -> BatchJudge:
    if judge == "shapes":
        return OneByOne(ShapeJudge())
    from pipelines.evaluation.detector.judge import Mask2FormerJudge

    return Mask2FormerJudge(judge, device)

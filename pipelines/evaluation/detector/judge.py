"""GenEval's judge of real pictures: objects by Mask2Former, their colours by CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from infra.errors import CheckpointError, EvaluationError
from pipelines.evaluation.detector.colours import ClipColours
from pipelines.evaluation.detector.mask2former import Found, Mask2Former
from pipelines.evaluation.detector.objects import OBJECTS
from pipelines.evaluation.detector.settings import DetectorSettings, name_of
from pipelines.evaluation.detector.weights import CLIP
from pipelines.evaluation.geneval import THRESHOLD
from pipelines.evaluation.judges import NO_MASK, BatchJudge, Detection, Image


class Mask2FormerJudge(BatchJudge):
    def __init__(self, settings: DetectorSettings, device: str = "cpu") -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        self.name, self.batch = name_of(settings), settings.batch
        self.detector = Mask2Former(settings.path, device)
        try:
            self.clip = ClipColours(settings.clip_settings, device)
        except CheckpointError as error:
            raise CheckpointError(error.message, remedy=CLIP) from None

    def detections(self, images: Sequence[Image]) -> list[list[Detection]]:
        try:
            return [_listed(found) for found in self.detector.detect(images)]
        except torch.OutOfMemoryError:
            raise EvaluationError(
                f"the GPU has too little memory for {len(images)} pictures at once", remedy="lower judge.batch"
            ) from None

    def colours(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        return self.clip.colours(objects)


def _listed(found: Found) -> list[Detection]:
    """Best first. A mask of 100 detections has the picture's size: only those that can count leave the device."""
    order = found.scores_N.argsort(descending=True, stable=True)
    scores = found.scores_N[order].cpu().numpy().astype(np.float32)
    counted = int((scores > THRESHOLD).sum())
    masks = found.masks_NHW[order[:counted]].cpu().numpy()
    rows = zip(found.labels_N[order].tolist(), scores.tolist(), found.boxes_N4[order].tolist(), strict=True)
    return [
        Detection(OBJECTS[label], score, (box[0], box[1], box[2], box[3]), masks[n] if n < counted else NO_MASK)
        for n, (label, score, box) in enumerate(rows)
    ]

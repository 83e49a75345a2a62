"""The colour of an object by CLIP: its box is cut out, grey where the object's mask is not, and compared with texts.

Shapes: N objects, C colours, D features, H and W the network's own size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor
from torch.nn import functional as F

from data_prep.scores.clip import load_clip
from data_prep.scores.settings import ClipSettings
from pipelines.evaluation.detector.objects import COLOURS
from pipelines.evaluation.judges import Detection, Image

BACKGROUND = "#999999"
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
BATCH = 16  # of crops, in GenEval's script


class ClipColours:
    def __init__(self, settings: ClipSettings, device: str = "cpu") -> None:
        self.model, self.preprocess, self.tokenize = load_clip(settings, device)
        self.device = device
        self._texts: dict[str, Tensor] = {}  # label -> the colours' features

    @torch.inference_mode()
    def colours(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        found: list[str] = []
        for first in range(0, len(objects), BATCH):
            batch = objects[first : first + BATCH]
            crops_N3HW = torch.stack([self.preprocess(crop(image, detection)) for image, detection in batch])
            images_ND = F.normalize(self.model.encode_image(crops_N3HW.to(self.device)).float(), dim=-1)
            texts_NCD = torch.stack([self._of(detection.label) for _, detection in batch])
            likest_N = torch.einsum("nd,ncd->nc", images_ND, texts_NCD).argmax(1)
            found += [COLOURS[number] for number in likest_N.tolist()]
        return found

    def _of(self, label: str) -> Tensor:
        """For each colour, the mean direction of a label's texts."""
        if label not in self._texts:
            texts = [template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES]
            features = F.normalize(self.model.encode_text(self.tokenize(texts).to(self.device)).float(), dim=-1)
            self._texts[label] = F.normalize(features.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)
        return self._texts[label]


def crop(image_HWC: Image, detection: Detection) -> Pictures.Image:
    picture = Pictures.fromarray(image_HWC)
    masked = Pictures.composite(
        picture, Pictures.new("RGB", picture.size, BACKGROUND), Pictures.fromarray(detection.mask_HW)
    )
    return masked.crop(tuple(np.rint(detection.box).astype(int).tolist()))

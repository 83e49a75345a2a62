"""Mask2Former as GenEval uses it: pictures are prepared and answers are read as mmdetection does both.

transformers' own image processor stretches pictures, and its post-processing cuts masks from a map of 384 x 384. Here a
picture is scaled to fit into 800 x 1333, and padded with grey. Of all pairs of query and class the 100 likeliest count;
a pair's score is the class's probability times the mean probability inside the mask, and its box is that of the mask.

Shapes: B images, Q queries, K classes, N detections, H and W the rows and columns of the picture, h and w those of the
padded input.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infra.causes import first_line
from infra.errors import CheckpointError
from pipelines.evaluation.detector import published
from pipelines.evaluation.detector.objects import OBJECTS
from pipelines.evaluation.detector.resize import Image, fitting, resized
from pipelines.evaluation.detector.weights import INSTEAD

SHORT, LONG, MULTIPLE = 800, 1333, 32
GREY = 128  # the padding, before pictures are normalised
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
PAIRS = 100  # of a query and a class, in a picture

# Modules that transformers has and Mask2Former on mmdetection has not: they take no part in detection.
_UNUSED = ("criterion.empty_weight", "model.pixel_level_module.encoder.swin.layernorm.")


class Found(NamedTuple):
    """What is in a picture: the order of detections is that of the topmost pairs' scores."""

    labels_N: Tensor
    scores_N: Tensor
    boxes_N4: Tensor  # left, top, right, bottom; right and bottom exclusive
    masks_NHW: Tensor


class Mask2Former:
    def __init__(self, weights: Path, device: str = "cpu") -> None:
        self.net, self.device = _load(weights).eval().to(device), device

    @torch.inference_mode()
    def detect(self, images: Sequence[Image]) -> list[Found]:
        """Pictures of one size share a batch, so that none is padded by the size of another."""
        order = sorted(range(len(images)), key=lambda n: images[n].shape[:2])
        found: dict[int, Found] = {}
        for _, group in groupby(order, key=lambda n: images[n].shape[:2]):
            numbers = list(group)
            found |= zip(numbers, self._alike([images[n] for n in numbers]), strict=True)
        return [found[n] for n in range(len(images))]

    def _alike(self, images: list[Image]) -> list[Found]:
        original = images[0].shape[0], images[0].shape[1]
        size = fitting(*original, SHORT, LONG)
        x_B3hw = torch.stack([prepared(resized(image, *size)) for image in images]).to(self.device)
        out = self.net(pixel_values=x_B3hw)
        pairs = zip(out.class_queries_logits.float(), out.masks_queries_logits.float(), strict=True)
        return [read(classes, masks, x_B3hw.shape[-2:], size, original) for classes, masks in pairs]


def prepared(image_HWC: Image) -> Tensor:
    """Padded at the right and the bottom, then normalised."""
    height, width, _ = image_HWC.shape
    bottom, right = -height % MULTIPLE, -width % MULTIPLE
    padded = np.pad(image_HWC, ((0, bottom), (0, right), (0, 0)), constant_values=GREY)
    x_hw3 = (torch.from_numpy(padded).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    return x_hw3.permute(2, 0, 1)


def read(
    classes_QK: Tensor, masks_Qhw: Tensor, padded: Sequence[int], size: Sequence[int], original: Sequence[int]
) -> Found:
    """A picture's detections, from the logits for masks and for classes, the last of which is "no object"."""
    probability_QK = classes_QK.softmax(-1)[:, :-1]
    things = probability_QK.shape[1]
    score_N, pair_N = probability_QK.flatten().topk(min(PAIRS, probability_QK.numel()))
    query_N, label_N = pair_N // things, pair_N % things
    used, place_N = query_N.unique(return_inverse=True)
    masks = F.interpolate(masks_Qhw[used, None], tuple(padded), mode="bilinear", align_corners=False)
    masks = masks[..., : size[0], : size[1]]
    masks = F.interpolate(masks, tuple(original), mode="bilinear", align_corners=False)[:, 0]
    inside = masks > 0
    sure = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return Found(label_N, score_N * sure[place_N], _boxes(inside)[place_N], inside[place_N])


def _boxes(masks_NHW: Tensor) -> Tensor:
    """The smallest box around each mask; zeros around an empty one."""
    boxes = torch.zeros(len(masks_NHW), 4, device=masks_NHW.device)
    for column, some in ((0, masks_NHW.any(1)), (1, masks_NHW.any(2))):
        length, filled = some.shape[1], some.any(1)
        first, last = some.float().argmax(1), length - some.flip(1).float().argmax(1)
        boxes[:, column] = torch.where(filled, first, 0)
        boxes[:, column + 2] = torch.where(filled, last, 0)
    return boxes


def _load(weights: Path) -> Any:
    import transformers

    try:
        if weights.is_dir():
            net = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(weights, dtype=torch.float32)
        else:
            net = _of_mmdetection(weights)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{weights} is no Mask2Former ({first_line(error)})",
            remedy=f"{INSTEAD}; or a folder in transformers' layout",
        ) from None
    if net.config.num_labels != len(OBJECTS):
        raise CheckpointError(
            f"{weights} knows {net.config.num_labels} classes, not COCO's {len(OBJECTS)} things",
            remedy=INSTEAD,
        )
    return net


def _of_mmdetection(weights: Path) -> Any:
    import transformers

    state = published.read(weights)
    config = transformers.Mask2FormerConfig(**published.config(state, weights))
    net = transformers.Mask2FormerForUniversalSegmentation(config)
    missing, unexpected = net.load_state_dict(published.converted(state, weights), strict=False)
    if lacking := [name for name in missing if not name.startswith(_UNUSED)]:
        raise CheckpointError(
            f"{weights} lacks {len(lacking)} tensors of Mask2Former: {', '.join(lacking[:5])}",
            remedy=INSTEAD,
        )
    assert not unexpected, "names are translated to those of the network"
    return net

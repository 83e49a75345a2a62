"""Losses on the predicted image as frozen networks see it: LPIPS for textures, DINOv2's features for contents.

PixelGen trains so in pixel space: with an image prediction, LPIPS 0.1 and features 0.01, at times from 0.3 on.
On a GPU, PyTorch's gradients of the encoder's resizing are not the same to the last bit in two runs.

Shapes: B images, N patches, V vision features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from training.diffusion.settings import PerceptualSettings
from training.encoders.lpips import Lpips
from training.encoders.vision import VisionEncoder


class Distance(NamedTuple):
    name: str
    weight: float
    apart_B: Tensor


@dataclass
class Perceptual:
    """No module, so that ZeRO neither shards nor casts what is frozen."""

    settings: PerceptualSettings
    lpips: Lpips | None
    vision: VisionEncoder | None

    def distances(
        self, image_BCHW: Tensor, target_BCHW: Tensor, features_BNV: Tensor | None, grid: tuple[int, int]
    ) -> list[Distance]:
        """`features_BNV` are the vision encoder's of the target, one for each patch of the grid."""
        distances = []
        if self.lpips is not None:
            distances.append(Distance("lpips", self.settings.lpips, self.lpips(image_BCHW, target_BCHW)))
        if self.vision is not None:
            assert features_BNV is not None
            seen_BNV = self.vision(image_BCHW, grid)
            distances.append(Distance("dino", self.settings.dino, feature_distance(seen_BNV, features_BNV)))
        return distances

    def applies(self, t_B: Tensor) -> Tensor:
        """1 for images whose time is one of those that the losses apply at, else 0."""
        low, high = self.settings.times
        return ((t_B >= low) & (t_B <= high)).float()


def perceptual_losses(
    settings: PerceptualSettings, lpips: str | None, vision: VisionEncoder | None
) -> Perceptual | None:
    """`lpips` names where its weights are; the vision encoder is that of REPA, if this is on too."""
    if not settings.any:
        return None
    network = Lpips(lpips) if settings.lpips and lpips is not None else None
    return Perceptual(settings, network, vision if settings.dino else None)


def feature_distance(one_BNV: Tensor, other_BNV: Tensor) -> Tensor:
    """1 - cosine similarity, averaged over an image's patches."""
    return 1 - F.cosine_similarity(one_BNV.float(), other_BNV.float(), dim=-1).mean(1)


def weighted_mean(values_B: Tensor, weights_B: Tensor) -> Tensor:
    """The mean over all places of the batch, also those of weight 0: else it would depend on the micro-batches."""
    return (values_B * weights_B).mean()

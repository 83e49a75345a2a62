"""Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940): a block's tokens, projected by a small head, are
trained towards the direction of a vision encoder's features of the same patches.

Shapes: B images, N patches, H hidden, V vision features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment_loss(projected_BNV: Tensor, features_BNV: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """1 - cosine similarity, averaged over all patches; an image of weight 0 adds nothing to the sum."""
    apart_BN = 1 - F.cosine_similarity(projected_BNV.float(), features_BNV.float(), dim=-1)
    return apart_BN.mean() if weight_B is None else (apart_BN.mean(1) * weight_B).mean()


class Alignment(NamedTuple):
    matched: Tensor
    shuffled: Tensor


@torch.no_grad()
def alignment(projected_BNV: Tensor, features_BNV: Tensor, others_BNV: Tensor | None = None) -> Alignment:
    """The mean cosine with the image's own features, and with those of another image of the batch at the same patches.

    The second is the control: a head that knows only the average image reaches it too.
    """
    assert len(features_BNV) > 1, "the control needs another image in the batch"
    others_BNV = features_BNV.roll(1, 0) if others_BNV is None else others_BNV
    matched, shuffled = (
        F.cosine_similarity(projected_BNV.float(), features.float(), dim=-1).mean()
        for features in (features_BNV, others_BNV)
    )
    return Alignment(matched, shuffled)

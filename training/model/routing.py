"""Token routing (TREAD, Krause et al. 2025, arXiv 2501.04765): while training, some of an image's tokens skip a range
of blocks and come back unchanged behind it. It saves most of these blocks' work, and needs no parameters.

Shapes: B images, N patches, M of them that are kept, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.model.rotary import RotaryTable


class Route(NamedTuple):
    """The patches of each image that go through all blocks; the others skip those from `first` to `last`."""

    kept_BM: Tensor  # indices, in order
    first: int  # blocks are counted from one
    last: int


def taken(tokens_BNH: Tensor, kept_BM: Tensor) -> Tensor:
    """The kept tokens: [B, M, H]."""
    return torch.gather(tokens_BNH, 1, _wide(kept_BM, tokens_BNH.shape[-1]))


def put_back(tokens_BNH: Tensor, kept_BM: Tensor, changed_BMH: Tensor) -> Tensor:
    """All tokens, the kept ones changed."""
    return torch.scatter(tokens_BNH, 1, _wide(kept_BM, tokens_BNH.shape[-1]), changed_BMH)


def positions_of(rotary: RotaryTable, kept_BM: Tensor) -> RotaryTable:
    """The angles of each image's kept patches: [B M, d/2], as for one image of all their tokens."""
    kept = kept_BM.flatten()
    return RotaryTable(rotary.cos[kept], rotary.sin[kept])


def _wide(kept_BM: Tensor, hidden: int) -> Tensor:
    return kept_BM.unsqueeze(-1).expand(-1, -1, hidden)

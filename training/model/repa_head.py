"""The head through which a block's tokens are compared with a vision encoder's features (`training.diffusion.repa`)."""

from __future__ import annotations

from torch import nn


class RepaHead(nn.Sequential):
    """Linear, SiLU, Linear, SiLU, Linear."""

    def __init__(self, hidden: int, features: int) -> None:
        super().__init__(
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )

"""The MLP that projects a block's tokens to the width of a vision encoder's features (`training.diffusion.repa`)."""

from __future__ import annotations

from torch import nn


class RepaHead(nn.Sequential):
    def __init__(self, hidden: int, features: int) -> None:
        super().__init__(
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )

"""An exponential moving average of the weights, kept in fp32 and sharded exactly as ZeRO shards the master weights.

It follows the fp32 masters, not the bf16 copies that the forward pass uses: at a decay of 0.9999 a bf16 average would
stand still. Each rank keeps only the part it owns, one flat tensor a parameter group, so an update is one fused lerp.
"""

from __future__ import annotations

import torch
from pydantic import Field

from infra.config import Settings


class EmaSettings(Settings):
    decay: float = Field(0.9999, ge=0, lt=1)
    warmup: bool = Field(False, description="start at a short memory: decay min(decay, (1 + step) / (10 + step))")


class Ema:
    def __init__(self, masters: list[torch.Tensor], settings: EmaSettings) -> None:
        self.settings = settings
        self.shards = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: list[torch.Tensor], step: int) -> None:
        """After the optimiser's step number `step`, counted from 0."""
        decay = self.settings.decay
        if self.settings.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shards, [master.detach() for master in masters], 1 - decay)

"""An exponential moving average (EMA) of the weights, in fp32 and sharded exactly as ZeRO shards the master weights.

It averages the fp32 masters: at a decay of 0.9999 a bf16 average would round every update away. Each rank keeps its own
range, one flat tensor per parameter group, so an update is one fused lerp. EMA weights in diffusion models: Song and
Ermon 2020, arXiv 2006.09011; the warm-up is that of TensorFlow's ExponentialMovingAverage with `num_updates`.
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
        """shard += (1 - decay) (master - shard), called after the optimiser's step number `step`, counted from 0."""
        decay = self.settings.decay
        if self.settings.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shards, [master.detach() for master in masters], 1 - decay)

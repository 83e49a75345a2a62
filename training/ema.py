"""Exponential moving averages (EMA) of the weights, in fp32 and sharded exactly as ZeRO shards the master weights.

They average the fp32 masters: at a decay of 0.9999 a bf16 average would round every update away. Each rank keeps its
own range, one flat tensor per parameter group, so an update of an average is one fused lerp. EMA weights in diffusion
models: Song and Ermon 2020, arXiv 2006.09011; the warm-up is that of TensorFlow's ExponentialMovingAverage with
`num_updates`; averages of a power-function profile: Karras et al. 2023, arXiv 2312.02696.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator

from infra.config import Settings, operational
from infra.records import Profile
from training.profiles import rate

PUBLISHED = "ema"  # the name of the average that is published, in states and among those that are kept

Decay = Annotated[float, Field(ge=0, lt=1)]
# The widest profile has the exponent 0, and the relative width 1 / sqrt(12).
Width = Annotated[float, Field(gt=0, le=0.288)]


class EmaSettings(Settings):
    decay: Decay = Field(0.9999, description="of the average that is published")
    warmup: bool = Field(False, description="start at a short memory: decay min(decay, (1 + step) / (10 + step))")
    more_decays: list[Decay] = Field([], description="of further averages; each is one more fp32 shard a rank")
    sigma_rel: list[Width] = Field(
        [],
        description="relative widths of further averages, each one more fp32 shard a rank; 0.05 and 0.1 with "
        "ema.keep_every let `pixnerd checkpoint ema` make averages of other widths afterwards",
    )
    keep_every: int = operational(
        0, ge=0, description="steps; all averages are kept for good at multiples of it; 0: at the end, if several"
    )

    @model_validator(mode="after")
    def _are_different(self) -> EmaSettings:
        decays = [self.decay, *self.more_decays]
        if len(set(decays)) < len(decays) or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError("an average is asked for twice: every decay and every sigma_rel is one")
        return self

    def profiles(self) -> dict[str, Profile]:
        """All averages by the names that they have in states, the published one first."""
        decays = {PUBLISHED: self.decay} | {f"{PUBLISHED}-decay-{decay}": decay for decay in self.more_decays}
        return {name: Profile(decay=decay, warmup=self.warmup) for name, decay in decays.items()} | {
            f"{PUBLISHED}-sigma-{width}": Profile(sigma_rel=width) for width in self.sigma_rel
        }

    def keeps(self, step: int, steps: int) -> bool:
        """Whether all averages of this step are kept for good."""
        if step == steps:
            return bool(self.keep_every or self.more_decays or self.sigma_rel)
        return self.keep_every > 0 and step % self.keep_every == 0


class Ema:
    def __init__(self, masters: list[torch.Tensor], settings: EmaSettings) -> None:
        self.profiles = settings.profiles()
        self.shards = {name: [master.detach().clone() for master in masters] for name in self.profiles}

    @torch.no_grad()
    def update(self, masters: list[torch.Tensor], step: int) -> None:
        """shard += rate (master - shard), called after the optimiser's step number `step`, counted from 0."""
        now = [master.detach() for master in masters]
        for name, shards in self.shards.items():
            torch._foreach_lerp_(shards, now, rate(self.profiles[name], step + 1))

"""One training step: a module with everything that is trained, its inputs, and its losses.

The module holds the denoiser, the REPA head, and the text encoder if that is trained too. Frozen encoders stay outside,
so that ZeRO neither shards nor casts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from infra.config import Fraction, Settings
from training.diffusion.objective import by_time, draw, velocity_loss
from training.diffusion.prediction import as_velocity
from training.diffusion.repa import Alignment, alignment, alignment_loss
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.loader.batches import Batch
from training.model.condition import Text
from training.model.pixnerd import PixNerd
from training.model.repa_head import RepaHead

TIME_BINS = 10


class ObjectiveSettings(Settings):
    time_shift: float = Field(2.0, gt=0, description="above 1: more of the training on noisy images")
    drop: Fraction = Field(0.1, description="share of captions replaced by the empty one, for guidance")
    repa: float = Field(0.5, ge=0, description="weight of the alignment with the vision encoder; 0: none")
    repa_block: int = Field(6, ge=1, description="the block whose tokens are aligned, counted from one")


class Trained(nn.Module):
    """All parameters that the optimiser updates; the forward pass computes the loss."""

    def __init__(
        self, net: PixNerd, head: RepaHead | None, text: TextEncoder | None, settings: ObjectiveSettings
    ) -> None:
        super().__init__()
        self.net, self.head, self.text, self.settings = net, head, text, settings

    def forward(self, inputs: Inputs) -> tuple[Tensor, Report]:
        text = inputs.text if self.text is None else self.text.encode(inputs.captions)
        assert text is not None
        tap = self.settings.repa_block if self.head is not None else None
        loss = velocity_loss(as_velocity(self.net), inputs.images_BCHW, text, inputs.noise_BCHW, inputs.t_B, tap)
        total = loss.per_sample_B.mean()
        by_bin = by_time(loss.per_sample_B, inputs.t_B, TIME_BINS)
        report = Report(len(loss.per_sample_B), total.detach(), *by_bin)
        if self.head is not None:
            assert loss.tokens_BNH is not None and inputs.features_BNV is not None
            projected = self.head(loss.tokens_BNH)
            total = total + self.settings.repa * alignment_loss(projected, inputs.features_BNV)
            report.alignment = alignment(projected, inputs.features_BNV)
        return total, report


@dataclass
class Inputs:
    images_BCHW: Tensor  # in [-1, 1]
    captions: list[str]  # the dropped ones are empty
    noise_BCHW: Tensor
    t_B: Tensor
    text: Text | None  # features of a frozen text encoder
    features_BNV: Tensor | None  # of the vision encoder, for REPA


@dataclass
class Report:
    """A micro-batch's figures, which `Meter` adds up over steps and ranks."""

    images: int
    loss: Tensor
    loss_by_time: Tensor
    count_by_time: Tensor
    alignment: Alignment | None = None


@dataclass
class Preparer:
    """Turns batches as they are read into the module's inputs: draws noise and times, encodes, moves to the device."""

    settings: ObjectiveSettings
    seed: int
    device: torch.device
    frozen_text: TextEncoder | None
    vision: VisionEncoder | None
    grid: tuple[int, int]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Inputs:
        images_BCHW = batch.images_BCHW.to(self.device).float() / 127.5 - 1
        shape = tuple(images_BCHW.shape[1:])
        noise, t, drop = draw(
            self.seed, batch.positions.tolist(), shape, shift=self.settings.time_shift, drop=self.settings.drop
        )
        captions = ["" if dropped else caption for dropped, caption in zip(drop, batch.captions, strict=True)]
        text = self.frozen_text.encode(captions) if self.frozen_text is not None else None
        features = self.vision(images_BCHW, self.grid) if self.vision is not None else None
        return Inputs(images_BCHW, captions, noise.to(self.device), t.to(self.device), text, features)

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
from training.diffusion.draws import normal
from training.diffusion.objective import by_time, velocity_loss
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
    """All parameters that the optimiser updates; the forward pass computes the loss, for validation without REPA's."""

    def __init__(
        self, net: PixNerd, head: RepaHead | None, text: TextEncoder | None, settings: ObjectiveSettings
    ) -> None:
        super().__init__()
        self.net, self.head, self.text, self.settings = net, head, text, settings

    def forward(self, inputs: Inputs) -> tuple[Tensor, Report]:
        text = inputs.text if self.text is None else self.text(inputs.ids_BT, inputs.mask_BT, inputs.lengths)
        assert text is not None
        tap = self.settings.repa_block if self.training and self.head is not None else None
        loss = velocity_loss(as_velocity(self.net), inputs.images_BCHW, text, inputs.noise_BCHW, inputs.t_B, tap)
        # The mean is over all places of the batch, also those of weight 0: else it would depend on the micro-batches.
        total = (loss.per_sample_B * inputs.weight_B).mean()
        by_bin = by_time(loss.per_sample_B, inputs.t_B, TIME_BINS, inputs.weight_B)
        unreadable = (1 - inputs.weight_B).sum()
        report = Report(len(loss.per_sample_B), total.detach(), *by_bin, unreadable, inputs.truncated_B.sum())
        if tap is not None and self.head is not None:
            assert loss.tokens_BNH is not None and inputs.features_BNV is not None
            projected = self.head(loss.tokens_BNH)
            total = total + self.settings.repa * alignment_loss(projected, inputs.features_BNV, inputs.weight_B)
            report.alignment = alignment(projected, inputs.features_BNV)
        return total, report


@dataclass
class Inputs:
    images_BCHW: Tensor  # in [-1, 1]
    weight_B: Tensor  # 0 where there was no image to read, else 1
    ids_BT: Tensor  # tokens of the captions
    mask_BT: Tensor
    truncated_B: Tensor  # whether a caption was longer than that
    lengths: list[int]  # tokens of each caption, which the CPU knows without waiting for the device
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
    unreadable: Tensor  # images that could not be decoded
    truncated: Tensor  # captions that were longer than the network takes
    alignment: Alignment | None = None


@dataclass
class Preparer:
    """Turns batches into the module's inputs, on the device: the noise from its bits, features from frozen encoders."""

    device: torch.device
    frozen_text: TextEncoder | None
    vision: VisionEncoder | None
    grid: tuple[int, int]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Inputs:
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        images_BCHW = batch.images_BCHW.contiguous().float() / 127.5 - 1
        noise_BCHW = normal(batch.bits_BN, tuple(images_BCHW.shape[1:]))
        tokens, lengths = (batch.ids_BT, batch.mask_BT), batch.lengths.tolist()
        text = self.frozen_text(*tokens, lengths) if self.frozen_text is not None else None
        features = self.vision(images_BCHW, self.grid) if self.vision is not None else None
        return Inputs(
            images_BCHW, batch.weight_B, *tokens, batch.truncated_B, lengths, noise_BCHW, batch.t_B, text, features
        )

"""One training step: a module with everything that is trained, its inputs, and its losses.

The module holds the denoiser, the REPA head, and the text encoder if that is trained too. Frozen encoders stay outside,
so that ZeRO neither shards nor casts them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from training.diffusion.draws import draw, normal
from training.diffusion.objective import Loss, by_time, velocity_loss
from training.diffusion.prediction import as_velocity, image_of_velocity
from training.diffusion.repa import alignment, alignment_loss
from training.diffusion.settings import ObjectiveSettings
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.loader.batches import Batch, Drawing
from training.model.condition import Condition
from training.model.pixnerd import PixNerd
from training.model.presets import ModelConfig
from training.model.repa_head import RepaHead
from training.model.routing import Route, taken
from training.perceptual import Perceptual, weighted_mean

TIME_BINS = 10


class Trained(nn.Module):
    """All parameters that the optimiser updates; the forward pass computes the loss.

    For validation it is the velocity's loss alone, and of all tokens.
    """

    def __init__(
        self,
        net: PixNerd,
        head: RepaHead | None,
        text: TextEncoder | None,
        settings: ObjectiveSettings,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.net, self.head, self.text, self.settings, self.perceptual = net, head, text, settings, perceptual

    def forward(self, inputs: Inputs) -> tuple[Tensor, Report]:
        condition = inputs.condition
        if self.text is not None:
            condition = self.text(inputs.ids_BT, inputs.mask_BT, inputs.lengths)
        assert condition is not None
        tap = self.settings.repa_block if inputs.aligned else None
        routed = self.training and self.settings.routing.share > 0
        route = Route(inputs.kept_BM, *self.settings.routing.blocks) if routed else None
        net = as_velocity(self.net)
        loss = velocity_loss(net, inputs.images_BCHW, condition, inputs.noise_BCHW, inputs.t_B, tap, route)
        # The mean is over all places of the batch, also those of weight 0: else it would depend on the micro-batches.
        total = (loss.per_sample_B * inputs.weight_B).mean()
        by_bin = by_time(loss.per_sample_B, inputs.t_B, TIME_BINS, inputs.weight_B)
        unreadable = (1 - inputs.weight_B).sum()
        report = Report(len(loss.per_sample_B), total.detach(), *by_bin, unreadable, inputs.truncated_B.sum())
        if inputs.aligned:
            total = total + self.settings.repa * self._alignment(loss, inputs, report)
        elif self.training and self.head is not None:
            total = total + self._rest(self.head)
        if self.training and self.perceptual is not None:
            total = total + self._perceptual(self.perceptual, loss, inputs, report)
        return total, report

    def _alignment(self, loss: Loss, inputs: Inputs, report: Report) -> Tensor:
        tokens, features = loss.tokens_BNH, inputs.features_BNV
        assert self.head is not None and tokens is not None and features is not None
        projected, others = self.head(tokens), features.roll(1, 0)
        if tokens.shape[1] < features.shape[1]:  # the aligned block is one that some tokens skip
            features, others = taken(features, inputs.kept_BM), taken(others, inputs.kept_BM)
        matched, shuffled = alignment(projected, features, others)
        one = torch.ones_like(matched)
        report.means |= {"repa/cosine": (matched, one), "repa/cosine_shuffled": (shuffled, one)}
        return alignment_loss(projected, features, inputs.weight_B)

    def _rest(self, head: RepaHead) -> Tensor:
        """Zero, with gradients of zero for a head at rest: ZeRO 3 would take those of its last use again."""
        weight = self.net.stem.weight
        nothing: Tensor = 0 * head(torch.zeros(1, self.net.config.hidden, dtype=weight.dtype, device=weight.device))
        return nothing.float().sum()

    def _perceptual(self, perceptual: Perceptual, loss: Loss, inputs: Inputs, report: Report) -> Tensor:
        image_BCHW = image_of_velocity(loss.v_BCHW, loss.x_t_BCHW, inputs.t_B)
        counted_B = perceptual.applies(inputs.t_B) * inputs.weight_B
        total = torch.zeros((), device=counted_B.device)
        grid = self.net.config.patches(*image_BCHW.shape[2:])
        for name, weight, apart_B in perceptual.distances(image_BCHW, inputs.images_BCHW, inputs.features_BNV, grid):
            total = total + weight * weighted_mean(apart_B, counted_B)
            report.means[f"perceptual/{name}"] = (apart_B.detach() * counted_B).sum(), counted_B.sum()
        return total


@dataclass
class Inputs:
    images_BCHW: Tensor  # in [-1, 1]
    weight_B: Tensor  # 0 where there was no image to read, else 1
    ids_BT: Tensor | None  # tokens of the captions; none where the condition is labels
    mask_BT: Tensor | None
    truncated_B: Tensor  # whether a caption was longer than that
    lengths: list[int]  # tokens of each caption, which the CPU knows without waiting for the device
    noise_BCHW: Tensor
    t_B: Tensor
    condition: Condition | None  # labels, or features of a frozen text encoder
    features_BNV: Tensor | None  # of the vision encoder, for REPA or a perceptual loss
    kept_BM: Tensor  # patches that skip no block; none where no token is routed
    aligned: bool  # whether REPA is on in this step


@dataclass
class Report:
    """A micro-batch's figures, which `Meter` adds up over steps and ranks."""

    images: int
    loss: Tensor
    loss_by_time: Tensor
    count_by_time: Tensor
    unreadable: Tensor  # images that could not be decoded
    truncated: Tensor  # captions that were longer than the network takes
    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> sum, and of how many


@dataclass
class Preparer:
    """Turns batches into the module's inputs, on the device: the noise from its bits, features from frozen encoders."""

    device: torch.device
    frozen_text: TextEncoder | None
    vision: VisionEncoder | None
    config: ModelConfig
    objective: ObjectiveSettings

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int | None = None) -> Inputs:
        """`step` is how many came before this one; without it, the batch is for validation."""
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        images_BCHW = batch.images_BCHW.contiguous().float() / 127.5 - 1
        noise_BCHW = self.config.noise_scale * normal(batch.bits_BN, tuple(images_BCHW.shape[1:]))
        lengths, condition = batch.lengths.tolist(), batch.labels_B
        if self.frozen_text is not None:
            condition = self.frozen_text(batch.ids_BT, batch.mask_BT, lengths)
        aligned = step is not None and self.objective.aligns(step)
        features = None
        if aligned or (step is not None and self.objective.perceptual.dino):
            assert self.vision is not None
            features = self.vision(images_BCHW, self.config.patches(*images_BCHW.shape[2:]))
        return Inputs(
            images_BCHW,
            batch.weight_B,
            batch.ids_BT,
            batch.mask_BT,
            batch.truncated_B,
            lengths,
            noise_BCHW,
            batch.t_B,
            condition,
            features,
            batch.kept_BM,
            aligned,
        )


def drawn(objective: ObjectiveSettings, config: ModelConfig, seed: int) -> Drawing:
    """What is drawn for samples of training. Tokens, of which routing keeps some, are an image's patches."""

    def routing(shape: tuple[int, ...]) -> tuple[int, int]:
        patches = math.prod(config.patches(*shape[1:]))
        return patches, objective.routing.kept(patches)

    return partial(
        draw,
        seed,
        shift=objective.time_shift,
        mean=objective.time_mean,
        deviation=objective.time_deviation,
        drop=objective.drop,
        routing=routing if objective.routing.share else None,
    )

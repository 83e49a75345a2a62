"""The FLOP of an image, by part: a multiplication with an addition counts as two, everything else as none.

Shapes: N patches, T text tokens, H hidden, I inner of the feed-forward part, K pixels of a patch, C field channels,
W = 2 C^2 r weights of a field block, E text features, V vision features.
"""

from __future__ import annotations

from typing import NamedTuple

from training.diffusion.settings import ObjectiveSettings, RoutingSettings
from training.encoders.shapes import LpipsShape, TextShape, VisionShape
from training.model.presets import ModelConfig

BACKWARD = 2  # times the forward pass, of what is trained
THROUGH = 1  # the same, of what is frozen and only passes a gradient on


def forward(config: ModelConfig, routing: RoutingSettings | None = None) -> dict[str, int]:
    """The network's forward pass at its training size, with token routing if it is given."""
    n, h, t = config.grid**2, config.hidden, config.text_tokens
    k, c = config.patch_size**2, config.field_channels
    text = config.task == "text"
    w = 2 * c * c * config.field_ratio
    joined = 2 * t * 2 * h * h if text else 0  # keys and values of the text, in every block of the trunk
    seen = t if text else 0
    skipped, kept = route(config, routing)
    parts = {
        "blocks": config.blocks * joined
        + (config.blocks - skipped) * _block(config, n, n + seen)
        + skipped * _block(config, kept, kept + seen),
        "text refine": config.text_blocks * _block(config, t, t) if text else 0,
        "text projection": 2 * t * config.text_dim * h if text else 0,
        "patches and time": 2 * n * 3 * k * h + 2 * (256 * h + h * h),
    }
    if not config.field_blocks:
        return parts | {"linear head": 2 * n * h * 3 * k}
    return parts | {
        "field weights": config.field_blocks * 2 * n * h * w,
        "field products": config.field_blocks * 2 * n * k * w,
        "field ends": 2 * n * k * c * (3 + 3),
    }


def route(config: ModelConfig, routing: RoutingSettings | None) -> tuple[int, int]:
    """How many blocks some tokens skip, and how many tokens do not."""
    if routing is None or not routing.share:
        return 0, config.grid**2
    first, last = routing.blocks
    return last - first + 1, routing.kept(config.grid**2)


def _block(config: ModelConfig, tokens: int, keys: int) -> int:
    h = config.hidden
    matrices = 4 * h * h + 3 * h * config.mlp_hidden
    return 2 * tokens * matrices + 4 * tokens * keys * h + 2 * 6 * h * h


class Encoders(NamedTuple):
    """The encoders of a run, and how many of the text encoder's layers it trains."""

    text: TextShape
    vision: VisionShape | None  # None: neither REPA nor a loss on its features
    train_text: int = 0
    bf16: bool = False  # what is frozen computes in bf16
    lpips: LpipsShape | None = None


class Work(NamedTuple):
    """The FLOP of an image in a training step, on average over the steps where REPA ends before the last.

    What is frozen has a precision of its own.
    """

    forward: dict[str, int]  # of the network, by part
    head: int  # of REPA, forward
    text: int  # forward
    text_trained: int  # of that, in layers that are trained
    vision: int  # forward, of the images that are learnt from
    perceptual: int  # of the predicted images in frozen networks, there and back, and LPIPS's of the others
    text_is_frozen: bool

    @property
    def trained(self) -> int:
        """Forward and backward of all that is trained, with the frozen layers of an encoder that is trained in part."""
        updated = sum(self.forward.values()) + self.head + self.text_trained
        return (1 + BACKWARD) * updated + (0 if self.text_is_frozen else self.text - self.text_trained)

    @property
    def frozen(self) -> int:
        return self.vision + self.perceptual + (self.text if self.text_is_frozen else 0)

    @property
    def step(self) -> int:
        return self.trained + self.frozen


def work(config: ModelConfig, encoders: Encoders, objective: ObjectiveSettings, steps: int) -> Work:
    n, h, vision, lpips = config.grid**2, config.hidden, encoders.vision, encoders.lpips
    aligned = min(steps, objective.repa_until or steps) / steps if objective.repa else 0.0
    skipped, kept = route(config, objective.routing)
    first = objective.routing.blocks[0]
    tapped = kept if skipped and first <= objective.repa_block < first + skipped else n
    seen = vision.forward(n) if vision else 0
    perceptual = (1 + THROUGH) * seen if objective.perceptual.dino else 0
    if lpips is not None:
        perceptual += (2 + THROUGH) * lpips.forward(config.grid * config.patch_size)
    return Work(
        forward=forward(config, objective.routing),
        head=round(aligned * 2 * tapped * (2 * h * h + h * vision.width)) if vision else 0,
        text=encoders.text.forward(config.text_tokens),
        text_trained=encoders.text.forward(config.text_tokens, encoders.train_text),
        vision=seen if objective.perceptual.dino else round(aligned * seen),
        perceptual=perceptual,
        text_is_frozen=encoders.train_text == 0,
    )

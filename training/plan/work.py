"""The FLOP of an image, by part: a multiplication with an addition counts as two, everything else as none.

Shapes: N patches, T text tokens, H hidden, I inner of the feed-forward part, K pixels of a patch, C field channels,
W = 2 C^2 r weights of a field block, E text features, V vision features.
"""

from __future__ import annotations

from typing import NamedTuple

from training.encoders.shapes import TextShape, VisionShape
from training.model.presets import ModelConfig

BACKWARD = 2  # times the forward pass, of what is trained


def forward(config: ModelConfig) -> dict[str, int]:
    """The network's forward pass at its training size."""
    n, h, t = config.grid**2, config.hidden, config.text_tokens
    k, c = config.patch_size**2, config.field_channels
    text = config.task == "text"
    w = 2 * c * c * config.field_ratio
    joined = 2 * t * 2 * h * h if text else 0  # keys and values of the text, in every block of the trunk
    parts = {
        "blocks": config.blocks * (_block(config, n, n + (t if text else 0)) + joined),
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


def _block(config: ModelConfig, tokens: int, keys: int) -> int:
    h = config.hidden
    matrices = 4 * h * h + 3 * h * config.mlp_hidden
    return 2 * tokens * matrices + 4 * tokens * keys * h + 2 * 6 * h * h


class Encoders(NamedTuple):
    """The encoders of a run, and how many of the text encoder's layers it trains."""

    text: TextShape
    vision: VisionShape | None  # None: no REPA
    train_text: int = 0
    bf16: bool = False  # what is frozen computes in bf16


class Work(NamedTuple):
    """The FLOP of an image in a training step. What is frozen has a precision of its own."""

    forward: dict[str, int]  # of the network, by part
    head: int  # of REPA, forward
    text: int  # forward
    text_trained: int  # of that, in layers that are trained
    vision: int  # forward
    text_is_frozen: bool

    @property
    def trained(self) -> int:
        """Forward and backward of all that is trained, with the frozen layers of an encoder that is trained in part."""
        updated = sum(self.forward.values()) + self.head + self.text_trained
        return (1 + BACKWARD) * updated + (0 if self.text_is_frozen else self.text - self.text_trained)

    @property
    def frozen(self) -> int:
        return self.vision + (self.text if self.text_is_frozen else 0)

    @property
    def step(self) -> int:
        return self.trained + self.frozen


def work(config: ModelConfig, encoders: Encoders) -> Work:
    n, h, vision = config.grid**2, config.hidden, encoders.vision
    return Work(
        forward=forward(config),
        head=2 * n * (2 * h * h + h * vision.width) if vision else 0,
        text=encoders.text.forward(config.text_tokens),
        text_trained=encoders.text.forward(config.text_tokens, encoders.train_text),
        vision=vision.forward(n) if vision else 0,
        text_is_frozen=encoders.train_text == 0,
    )

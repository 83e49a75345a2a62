"""A network's settings, and presets of them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from infra.config import Settings, nearest
from infra.errors import SettingsError

_TELL_SIZE = "import again with --trained-size N"  # needed because a published file does not record the size


class ModelConfig(Settings):
    """Everything that decides the tensors of a network and what it computes with them.

    The published networks of the two tasks also differ in their rotary positions, the width of the feed-forward part,
    and whether a norm's weight is applied in fp32. These three are not design choices, so they are not settings but
    properties that follow from `task`.
    """

    task: Literal["text", "class"] = "text"
    image_size: PositiveInt | None = Field(
        256, description="side of the square training images, in pixels; null: not known"
    )
    patch_size: PositiveInt = 16
    hidden: PositiveInt = 1536
    heads: PositiveInt = 24
    blocks: PositiveInt = 16

    text_blocks: int = Field(default=4, ge=0, description="blocks over the text alone, before the trunk")
    text_dim: PositiveInt = Field(default=2048, description="width of the text encoder's features")
    text_tokens: PositiveInt = Field(default=128, description="most text tokens of a caption")
    text_padding: Literal["published", "masked"] = Field(
        default="published",
        description="published: pads are attended to like words, as the published weights learnt it",
    )
    round_text: bool = Field(
        default=False, description="round the encoder's features to bf16, as the published weights learnt them"
    )
    classes: PositiveInt = Field(default=1000, description="labels; one more stands for no class")

    field_blocks: int = Field(default=2, ge=0, description="0: no field, a linear head instead")
    field_channels: PositiveInt = 64
    field_ratio: PositiveInt = 2
    coordinate_code: Literal["cosine", "dct", "sincos"] = "dct"
    field_norm: Literal["fc1", "fc1_fc2", "fc1_fc2_out"] = "fc1_fc2_out"

    prediction: Literal["velocity", "image"] = Field(
        "velocity", description="what the network predicts; an image is converted to a velocity"
    )
    noise_scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="deviation of the noise that it learns from and draws from"
    )
    open_gates: bool = Field(
        False,
        description="start with the blocks' gates at 1, not near 0: short runs then follow the caption sooner",
    )
    fixed_grid: bool = Field(
        default=False, description="any size: the trunk keeps the training size's grid, the field draws larger patches"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.head_dim % 4:
            raise ValueError(f"hidden / heads is {self.head_dim}; rotary positions need a multiple of 4")
        if self.image_size is not None and self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.fixed_grid and self.image_size is None:
            raise ValueError(f"fixed_grid needs image_size, the size that it was trained at: {_TELL_SIZE}")
        if self.fixed_grid and not self.field_blocks:
            raise ValueError("fixed_grid needs a field (field_blocks > 0): a linear head has one patch size only")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        return 4 * self.hidden if self.task == "text" else int(2 / 3 * 4 * self.hidden)

    @property
    def rope_extent(self) -> float | None:
        """The last position on both axes; None: x ends at the number of rows, and y at the number of columns."""
        return None if self.task == "text" else 16.0

    @property
    def norm_weight_in_fp32(self) -> bool:
        """Whether a norm's weight is applied before the result is cast to bf16, or after.

        For example, in bf16 the published text-to-image network computes `(x / rms(x) * weight).bfloat16()`, the
        class-to-image one `(x / rms(x)).bfloat16() * weight`. The field's norms always apply it in fp32.
        """
        return self.task == "text"

    @property
    def grid(self) -> int:
        """Patches per side at the training size."""
        if self.image_size is None:
            raise SettingsError("the size that this network was trained at is not known", remedy=_TELL_SIZE)
        return self.image_size // self.patch_size

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image."""
        return (self.grid, self.grid) if self.fixed_grid else (height // self.patch_size, width // self.patch_size)

    @property
    def size_step(self) -> int:
        """The number of which an image's sides must be multiples."""
        return self.grid if self.fixed_grid else self.patch_size

    def check_size(self, height: int, width: int) -> None:
        step = self.size_step
        if height % step or width % step or not height or not width:
            near = " or ".join(f"{_near(height, step, up)}x{_near(width, step, up)}" for up in (False, True))
            raise SettingsError(
                f"a {height}x{width} image does not fit this network: its sides must be multiples of {step}",
                remedy=f"ask for {near}",
            )


def _near(side: int, step: int, up: bool) -> int:
    return max(step, (side + (step - 1 if up else 0)) // step * step)


_CLASS = ModelConfig(task="class", hidden=1152, heads=16, blocks=26, field_blocks=4)

PRESETS: dict[str, ModelConfig] = {
    # Published code and paper disagree about the field: this is the code's network, and the next one the paper's.
    "XXL/16": ModelConfig(coordinate_code="cosine", field_norm="fc1", round_text=True),
    "XXL/16-dct": ModelConfig(),
    "XL/16": _CLASS,
    "XL/8": _CLASS.model_copy(update={"patch_size": 8}),
    "L/16": _CLASS.model_copy(update={"hidden": 1024, "blocks": 22, "field_blocks": 2}),
    "PixDiT-L/16": _CLASS.model_copy(update={"hidden": 1024, "blocks": 24, "field_blocks": 0}),
    # Its small text encoder is trained with it, so it needs no text-refine blocks.
    "tiny": ModelConfig(
        image_size=32,
        patch_size=8,
        hidden=96,
        heads=3,
        blocks=3,
        text_blocks=0,
        text_dim=96,
        text_tokens=16,
        text_padding="masked",
        field_blocks=2,
        field_channels=16,
        open_gates=True,
    ),
}

# Training settings of presets where a recipe gives none: a small network on a CPU needs other ones than a large one.
_TRAINING: dict[str, dict[str, Any]] = {
    "tiny": {
        "precision": "fp32",
        # No REPA: a useful vision encoder is far larger than this network.
        "objective": {"time_shift": 4.0, "repa": 0.0},
        "optim": {"lr": 1.0e-3, "warmup": 50, "betas": [0.9, 0.99]},
        "ema": {"decay": 0.99, "warmup": True},
    }
}


def training_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings of a training run, completed by those of its preset.

    The REPA block defaults to the same relative depth as the published one, the sixth of sixteen.
    """
    settings = dict(recipe)
    network = PRESETS.get(str(recipe.get("preset")))
    if network is None:
        return settings
    for name, default in _TRAINING.get(str(recipe["preset"]), {}).items():
        _complete(settings, name, default)
    model = recipe.get("model")
    blocks = model.get("blocks", network.blocks) if isinstance(model, Mapping) else network.blocks
    if isinstance(blocks, int):
        _complete(settings, "objective", {"repa_block": max(1, -(-6 * blocks // 16))})
    return settings


def _complete(settings: dict[str, Any], name: str, default: Any) -> None:
    """Set a default; where both it and the present value are mappings, only those keys that are absent."""
    if isinstance(default, Mapping) and isinstance(present := settings.get(name, {}), Mapping):
        settings[name] = {**default, **present}
    else:
        settings.setdefault(name, default)


def preset(name: str) -> ModelConfig:
    if name in PRESETS:
        return PRESETS[name]
    near = nearest(name, PRESETS)
    raise SettingsError(
        f"there is no preset {name!r}", remedy=f"did you mean {near!r}?" if near else f"known: {', '.join(PRESETS)}"
    )

"""What a network is made of, and the sizes that have names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from infra.config import Settings, nearest
from infra.errors import SettingsError

_TELL_SIZE = "import again with --trained-size N"  # a published file's names and shapes do not tell it


class ModelConfig(Settings):
    """Everything that decides the tensors of a network and what it computes with them.

    The two published networks differ in more than their condition: `task` also decides the rotary positions, the width
    of the feed-forward part and the moment at which a norm's weight is applied. Nobody chose those three, so they are
    not settings; they are the properties below.
    """

    task: Literal["text", "class"] = "text"
    image_size: PositiveInt | None = Field(
        default=256, description="side of the square training images, in pixels; null: nobody told"
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
        default="velocity",
        description="what the network gives; of an image a velocity is made",
    )
    open_gates: bool = Field(
        False, description="start with the blocks' gates at 1, not near 0: a short run learns what words mean sooner"
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
        """Where both axes' positions end; None: x ends at the number of rows and y at that of columns."""
        return None if self.task == "text" else 16.0

    @property
    def norm_weight_in_fp32(self) -> bool:
        """Of a norm whose result is rounded before anything else; the field's own, inside of a product, always is."""
        return self.task == "text"

    @property
    def grid(self) -> int:
        """Patches a side at the training size."""
        if self.image_size is None:
            raise SettingsError("the size that this network was trained at is not known", remedy=_TELL_SIZE)
        return self.image_size // self.patch_size

    @property
    def size_step(self) -> int:
        """What the sides of an image must be multiples of."""
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
    # As published, where code and paper disagree about the field; the next one is the paper's form, the default.
    "XXL/16": ModelConfig(coordinate_code="cosine", field_norm="fc1", round_text=True),
    "XXL/16-dct": ModelConfig(),
    "XL/16": _CLASS,
    "XL/8": _CLASS.model_copy(update={"patch_size": 8}),
    "L/16": _CLASS.model_copy(update={"hidden": 1024, "blocks": 22, "field_blocks": 2}),
    "PixDiT-L/16": _CLASS.model_copy(update={"hidden": 1024, "blocks": 24, "field_blocks": 0}),
    # Its small text encoder is trained along and does the refining, so it has no text-refine blocks of its own.
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

# How a preset is trained where a recipe does not say: a small network on a CPU needs other settings than a large one.
_TRAINING: dict[str, dict[str, Any]] = {
    "tiny": {
        "precision": "fp32",
        # A vision encoder that is worth being aligned with is far larger than this network.
        "objective": {"time_shift": 4.0, "repa": 0.0},
        "optim": {"lr": 1.0e-3, "warmup": 50, "betas": [0.9, 0.99]},
        "ema": {"decay": 0.99, "warmup": True},
    }
}


def training_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of a training run, over what its preset says: the defaults of a preset fit each other.

    The block that is aligned with a vision encoder lies as deep as the published one, the sixth of sixteen.
    """
    found = dict(given)
    network = PRESETS.get(str(given.get("preset")))
    if network is None:
        return found
    for name, default in _TRAINING.get(str(given["preset"]), {}).items():
        _fill(found, name, default)
    model = given.get("model")
    blocks = model.get("blocks", network.blocks) if isinstance(model, Mapping) else network.blocks
    if isinstance(blocks, int):
        _fill(found, "objective", {"repa_block": max(1, -(-6 * blocks // 16))})
    return found


def _fill(settings: dict[str, Any], name: str, default: Any) -> None:
    """Mappings are filled up key by key; whatever else is given stays as it is."""
    if isinstance(default, Mapping) and isinstance(given := settings.get(name, {}), Mapping):
        settings[name] = {**default, **given}
    else:
        settings.setdefault(name, default)


def preset(name: str) -> ModelConfig:
    if name in PRESETS:
        return PRESETS[name]
    near = nearest(name, PRESETS)
    raise SettingsError(
        f"there is no preset {name!r}", remedy=f"did you mean {near!r}?" if near else f"known: {', '.join(PRESETS)}"
    )

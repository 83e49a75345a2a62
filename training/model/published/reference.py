"""Translates between our tensor names and the published code's, and infers settings from names and shapes.

Each of their tensors is one of ours, with one exception: their class-to-image feed-forward part keeps gate and value in
two matrices (`mlp.w1`, `mlp.w3`), and ours in one. Joining and splitting only copy values, so a round trip is exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from infra.config import parse
from infra.errors import CheckpointError, SettingsError
from training.model.fit import REMEDY, Shape, differences, plain, refuse, shapes
from training.model.presets import ModelConfig

# Our module -> theirs, or the two of theirs whose tensors ours joins.
Names = dict[str, str | tuple[str, str]]

_OUTER: Names = {
    "stem": "s_embedder.proj",
    "time.fc1": "t_embedder.mlp.0",
    "time.fc2": "t_embedder.mlp.2",
    "text.proj": "y_embedder.proj",
    "text.norm": "y_embedder.norm",
    "text.positions": "y_pos_embedding",
    "label": "y_embedder.embedding_table",
    "field.pixel_in": "x_embedder.embedder.0",
    "field.norm": "final_layer.norm",
    "field.out": "final_layer.linear",
}
_BLOCK: Names = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.q_norm": "attn.q_norm",
    "attn.k_norm": "attn.k_norm",
    "attn.out": "attn.proj",
    "modulation": "adaLN_modulation.0",
}
_IMAGE_TEXT: Names = {"attn.qkv": "attn.qkv_x", "attn.kv_text": "attn.kv_y"}
_SELF: Names = {"attn.qkv": "attn.qkv"}
_FUSED_MLP: Names = {"mlp.gate_value": "mlp.w12", "mlp.out": "mlp.w3"}
_SPLIT_MLP: Names = {"mlp.gate_value": ("mlp.w1", "mlp.w3"), "mlp.out": "mlp.w2"}
_FIELD: Names = {"weights": "param_generator1.0", "norm": "norm"}


def modules(config: ModelConfig) -> Names:
    """Our modules' names -> the reference's, for a network of these settings."""
    assert config.field_blocks, "a network without a field has no published layout: refuse_other_than_published"
    names = dict(_OUTER)
    text = config.task == "text"
    mlp = _FUSED_MLP if text else _SPLIT_MLP
    block: Names = {**_BLOCK, **mlp, **(_IMAGE_TEXT if text else _SELF)}
    refine: Names = {**_BLOCK, **mlp, **_SELF}
    for i in range(config.blocks):
        names |= _under(f"trunk.{i}", f"blocks.{i}", block)
    for i in range(config.text_blocks if text else 0):
        names |= _under(f"text.blocks.{i}", f"text_refine_blocks.{i}", refine)
    for i in range(config.field_blocks):
        names |= _under(f"field.blocks.{i}", f"blocks.{config.blocks + i}", _FIELD)
    return names


def _under(ours: str, theirs: str, names: Names) -> Names:
    """The names with `ours.` in front of our names and `theirs.` in front of theirs."""

    def prefixed(name: str | tuple[str, str]) -> str | tuple[str, str]:
        return f"{theirs}.{name}" if isinstance(name, str) else (f"{theirs}.{name[0]}", f"{theirs}.{name[1]}")

    return {f"{ours}.{module}": prefixed(name) for module, name in names.items()}


def _tensor_names(ours: str, names: Names) -> tuple[str, ...]:
    """The reference's tensors that make up one of ours: trunk.0.norm1.weight -> (blocks.0.norm1.weight,)."""
    if ours in names:  # a parameter of the network itself, such as text.positions
        theirs, leaf = names[ours], ""
    else:
        module, _, leaf = ours.rpartition(".")
        theirs, leaf = names[module], f".{leaf}"
    return tuple(f"{name}{leaf}" for name in ((theirs,) if isinstance(theirs, str) else theirs))


def to_reference(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    names = modules(config)
    out: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        theirs = _tensor_names(ours, names)
        out |= dict(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    return out


def from_reference(
    theirs: Mapping[str, Tensor], config: ModelConfig, expected: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Our tensors of theirs. `expected` is the state_dict of a network with these settings, on any device.

    Errors name tensors as the file does, with `prefix` in front.
    """
    check_layout(shapes(theirs), config, shapes(expected), prefix)
    names = modules(config)
    joined: dict[str, Tensor] = {}
    for ours in expected:
        sources = _tensor_names(ours, names)
        joined[ours] = _join([theirs[name] for name in sources], sources, prefix)
    return joined


def check_layout(
    actual: Mapping[str, Shape], config: ModelConfig, expected: Mapping[str, Shape], prefix: str = ""
) -> None:
    """Raises unless `actual`, shapes by their names, are those that `expected`, shapes by our names, translate to."""
    names = modules(config)
    translated: dict[str, Shape] = {}
    for ours, shape in expected.items():
        theirs = _tensor_names(ours, names)
        translated |= dict.fromkeys(theirs, (shape[0] // len(theirs), *shape[1:]))
    refuse(differences(translated, actual, prefix), "this is not the published layout", REMEDY)


def _join(tensors: list[Tensor], names: tuple[str, ...], prefix: str) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if len({tensor.dtype for tensor in tensors}) > 1:
        types = " and ".join(f"{prefix}{name} {plain(t.dtype)}" for name, t in zip(names, tensors, strict=True))
        raise CheckpointError(
            f"{types} are of different types, but stand in one tensor here", remedy="convert them to one type first"
        )
    return torch.cat(tensors)


# ------------------------------------------------------------------------------------------------ settings

# Settings that cannot be inferred, because the published code of each task has one fixed value of each.
_FIXED: dict[str, dict[str, str | bool]] = {
    "text": {"coordinate_code": "cosine", "field_norm": "fc1", "text_padding": "published", "round_text": True},
    "class": {"coordinate_code": "dct", "field_norm": "fc1_fc2_out"},
}
_MOST_BLOCKS = 1000  # a file that claims more is taken for hostile


def refuse_other_than_published(config: ModelConfig) -> None:
    """Raises unless the published code, which has fixed values for these settings, computes the same network."""
    fixed = {"prediction": "velocity", **_FIXED[config.task]}
    problems = [
        f"{name} is {getattr(config, name)}, the published code has {value}"
        for name, value in fixed.items()
        if getattr(config, name) != value
    ]
    if not config.field_blocks:
        problems = ["field_blocks is 0, the published code has a field"]
    refuse(
        problems,
        "this network has no published layout, as the published code would compute something else with its weights",
        "keep it in its folder, which `pixnerd sample` reads; what shall be exported is trained with `preset: XXL/16`",
    )


def find_config(tensors: Mapping[str, Shape], prefix: str = "") -> ModelConfig:
    """Infer the settings of a published network from its tensors' names and shapes, which do not tell its image size.

    Only those tensors are looked at that a setting needs; `check_layout` checks the rest.
    """
    return _Finder(tensors, prefix).config()


class _Finder:
    def __init__(self, tensors: Mapping[str, Shape], prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix

    def config(self) -> ModelConfig:
        task = self._task()
        hidden, columns = self._shape("t_embedder.mlp.2.weight", 2)
        if hidden != columns:
            raise self._error("t_embedder.mlp.2.weight", f"is {[hidden, columns]}, not square")
        blocks, field = self._blocks("blocks"), self._field_blocks()
        channels, _ = self._shape("x_embedder.embedder.0.weight", 2)
        settings = {
            "task": task,
            "image_size": None,
            "patch_size": self._patch_size(),
            "hidden": hidden,
            "heads": self._heads(hidden),
            "blocks": blocks - field,
            "field_blocks": field,
            "field_channels": channels,
            "field_ratio": self._ratio(f"blocks.{blocks - field}.param_generator1.0.bias", channels),
            **_FIXED[task],
        }
        if task == "text":
            settings["text_blocks"] = self._blocks("text_refine_blocks")
            settings["text_dim"] = self._shape("y_embedder.proj.weight", 2)[1]
            settings["text_tokens"] = self._shape("y_pos_embedding", 3)[1]
        else:
            settings["classes"] = self._classes()
        try:
            return parse(ModelConfig, settings)
        except SettingsError as error:
            raise CheckpointError(f"these are no network's sizes: {error.message}", remedy=REMEDY) from None

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.prefix}{name} {problem}", remedy=REMEDY)

    def _shape(self, name: str, dimensions: int) -> Shape:
        if name not in self.tensors:
            raise self._error(name, "is missing")
        shape = self.tensors[name]
        if len(shape) != dimensions or 0 in shape:
            raise self._error(name, f"is {list(shape)}, not {dimensions} sizes above 0")
        return shape

    def _task(self) -> Literal["text", "class"]:
        if "y_embedder.proj.weight" in self.tensors:
            return "text"
        if "y_embedder.embedding_table.weight" in self.tensors:
            return "class"
        names = " nor ".join(f"{self.prefix}y_embedder.{name}.weight" for name in ("proj", "embedding_table"))
        raise CheckpointError(f"there is neither {names}: this is no published network", remedy=REMEDY)

    def _patch_size(self) -> int:
        name = "s_embedder.proj.weight"
        values = self._shape(name, 2)[1]
        side = math.isqrt(values // 3)
        if 3 * side**2 != values:
            raise self._error(name, f"takes {values} values, which is no square patch of three channels")
        return side

    def _heads(self, hidden: int) -> int:
        name = "blocks.0.attn.q_norm.weight"
        (size,) = self._shape(name, 1)
        if hidden % size or size % 4:
            raise self._error(name, f"has {size} values: a head's size is a multiple of 4 that divides {hidden}")
        return hidden // size

    def _ratio(self, name: str, channels: int) -> int:
        (values,) = self._shape(name, 1)
        if values % (2 * channels**2):
            raise self._error(name, f"has {values} values, which is no multiple of 2 x {channels} x {channels}")
        return values // (2 * channels**2)

    def _classes(self) -> int:
        name = "y_embedder.embedding_table.weight"
        rows = self._shape(name, 2)[0]
        if rows < 2:
            raise self._error(name, "has one row: beside no class there is none")
        return rows - 1

    def _blocks(self, stack: str) -> int:
        numbers = self._numbers(rf"{stack}\.(0|[1-9]\d{{0,5}})\.")
        for number in range(max(numbers, default=-1) + 1):
            if number not in numbers:
                raise self._error(f"{stack}.{number}", "is missing")
            if number == _MOST_BLOCKS:
                raise self._error(f"{stack}.{number}", f"is one of more than {_MOST_BLOCKS} blocks")
        return len(numbers)

    def _field_blocks(self) -> int:
        """The number of field blocks, which follow the trunk's blocks in the same list."""
        numbers = self._numbers(r"blocks\.(0|[1-9]\d{0,5})\.param_generator1\.")
        if not numbers:
            raise self._error("blocks.*.param_generator1.0.weight", "is missing: there is no neural field")
        return self._blocks("blocks") - min(numbers)

    def _numbers(self, pattern: str) -> set[int]:
        return {int(match[1]) for match in map(re.compile(pattern).match, self.tensors) if match}

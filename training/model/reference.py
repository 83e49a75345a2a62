"""The published checkpoints' names and settings, in ours and back.

Every tensor of theirs is one of ours, with one exception: the class-to-image feed-forward part keeps its gate and value
apart (`mlp.w1`, `mlp.w3`), while ours stand in one matrix. Joining and cutting copy values, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infra.errors import CheckpointError
from training.model.presets import ModelConfig

# Our module -> theirs, or the two of theirs that ours joins.
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
_ALONE: Names = {"attn.qkv": "attn.qkv"}
_FUSED: Names = {"mlp.gate_value": "mlp.w12", "mlp.out": "mlp.w3"}
_APART: Names = {"mlp.gate_value": ("mlp.w1", "mlp.w3"), "mlp.out": "mlp.w2"}
_FIELD: Names = {"weights": "param_generator1.0", "norm": "norm"}


def modules(config: ModelConfig) -> Names:
    """Our modules' names -> the reference's, for a network of these settings."""
    if not config.field_blocks:
        raise CheckpointError(
            "the linear-head baseline has no published layout", remedy="keep it in this project's own format"
        )
    names = dict(_OUTER)
    text = config.task == "text"
    mlp = _FUSED if text else _APART
    block: Names = {**_BLOCK, **mlp, **(_IMAGE_TEXT if text else _ALONE)}
    refine: Names = {**_BLOCK, **mlp, **_ALONE}
    for i in range(config.blocks):
        names |= _under(f"trunk.{i}", f"blocks.{i}", block)
    for i in range(config.text_blocks if text else 0):
        names |= _under(f"text.blocks.{i}", f"text_refine_blocks.{i}", refine)
    for i in range(config.field_blocks):
        names |= _under(f"field.blocks.{i}", f"blocks.{config.blocks + i}", _FIELD)
    return names


def _under(ours: str, theirs: str, names: Names) -> Names:
    def place(name: str | tuple[str, str]) -> str | tuple[str, str]:
        return f"{theirs}.{name}" if isinstance(name, str) else (f"{theirs}.{name[0]}", f"{theirs}.{name[1]}")

    return {f"{ours}.{mine}": place(name) for mine, name in names.items()}


def _tensor_names(ours: str, names: Names) -> tuple[str, ...]:
    """The reference's tensors that make up one tensor of ours."""
    if ours in names:  # a bare parameter
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
    theirs: Mapping[str, Tensor], config: ModelConfig, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors; `expected` is the state of a network of these settings (its names and shapes, on any device).

    A tensor that is missing, left over or of another shape is refused by the name that it has in the file.
    """
    names = modules(config)
    out: dict[str, Tensor] = {}
    problems: list[str] = []
    used: set[str] = set()
    for ours, want in expected.items():
        sources = _tensor_names(ours, names)
        used.update(sources)
        shape = (want.shape[0] // len(sources), *want.shape[1:])
        missing = [name for name in sources if name not in theirs]
        problems += [f"{name} is missing" for name in missing]
        wrong = [name for name in sources if name in theirs and tuple(theirs[name].shape) != shape]
        problems += [f"{name} is {tuple(theirs[name].shape)} instead of {shape}" for name in wrong]
        if not missing and not wrong:
            out[ours] = theirs[sources[0]] if len(sources) == 1 else torch.cat([theirs[name] for name in sources])
    problems += [f"{name} is left over" for name in theirs if name not in used]
    if problems:
        raise CheckpointError(
            "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""),
            remedy="import a file of the published layout, with the settings that it was trained with",
        )
    return out


def config_of(cfg: Mapping[str, Any], *, image_size: int, fixed_grid: bool = False) -> ModelConfig:
    """Settings from the reference's own arguments; the published networks' fixed choices go with their task."""
    common = {
        "image_size": image_size,
        "patch_size": cfg["patch_size"],
        "hidden": cfg["hidden_size"],
        "heads": cfg["num_groups"],
        "fixed_grid": fixed_grid,
    }
    if "num_classes" in cfg:
        return ModelConfig(
            **common,
            task="class",
            classes=cfg["num_classes"],
            blocks=cfg["num_cond_blocks"],
            field_blocks=cfg["num_blocks"] - cfg["num_cond_blocks"],
            field_channels=cfg["hidden_size_x"],
            field_ratio=cfg["nerf_mlpratio"],
            coordinate_code="dct",
            field_norm="fc1_fc2_out",
        )
    return ModelConfig(
        **common,
        task="text",
        text_dim=cfg["txt_embed_dim"],
        text_tokens=cfg["txt_max_length"],
        text_blocks=cfg["num_text_blocks"],
        blocks=cfg["num_encoder_blocks"],
        field_blocks=cfg["num_decoder_blocks"],
        field_channels=cfg["decoder_hidden_size"],
        field_ratio=cfg.get("nerf_mlpratio", 2),
        coordinate_code="cosine",
        field_norm="fc1",
    )

"""mmdetection's Mask2Former (version 2) in transformers' layout: each tensor is used, or refused by its name.

    backbone.stages.0.blocks.1.attn.w_msa.qkv        -> encoder.swin.encoder.layers.0.blocks.1.attention.{q,k,v}_proj
    panoptic_head.transformer_decoder.layers.3.attentions.0    -> transformer_module.decoder.layers.3.cross_attn

Two things are not renamed only. mmdetection keeps queries, keys and values in one matrix. And where Swin merges patches
of 2 x 2 positions, mmdetection's channels lie as `unfold` gives them: channel by channel, in each the positions row by
row. transformers has position after position, the two of a column first.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.causes import first_line
from infra.errors import CheckpointError
from infra.files import sha256_of
from pipelines.evaluation.detector.weights import INSTEAD, MASK2FORMER

State = dict[str, Tensor]

_SWIN = "model.pixel_level_module.encoder.swin"
_PIXELS = "model.pixel_level_module.decoder"
_MODULE = "model.transformer_module"
_BLOCK = r"backbone\.stages\.(\d+)\.blocks\.(\d+)"
_PIXEL_LAYER = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"
_LAYER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)"

# mmdetection's module -> transformers', for tensors that only change their name.
_RENAMED = {
    r"backbone\.patch_embed\.projection": rf"{_SWIN}.embeddings.patch_embeddings.projection",
    r"backbone\.patch_embed\.norm": rf"{_SWIN}.embeddings.norm",
    rf"{_BLOCK}\.norm1": rf"{_SWIN}.encoder.layers.\1.blocks.\2.layernorm_before",
    rf"{_BLOCK}\.norm2": rf"{_SWIN}.encoder.layers.\1.blocks.\2.layernorm_after",
    rf"{_BLOCK}\.attn\.w_msa\.proj": rf"{_SWIN}.encoder.layers.\1.blocks.\2.attention.o_proj",
    rf"{_BLOCK}\.ffn\.layers\.0\.0": rf"{_SWIN}.encoder.layers.\1.blocks.\2.mlp.fc1",
    rf"{_BLOCK}\.ffn\.layers\.1": rf"{_SWIN}.encoder.layers.\1.blocks.\2.mlp.fc2",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv": rf"{_PIXELS}.input_projections.\1.0",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn": rf"{_PIXELS}.input_projections.\1.1",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv": rf"{_PIXELS}.adapter_1.0",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn": rf"{_PIXELS}.adapter_1.1",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv": rf"{_PIXELS}.layer_1.0",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn": rf"{_PIXELS}.layer_1.1",
    r"panoptic_head\.pixel_decoder\.mask_feature": rf"{_PIXELS}.mask_projection",
    rf"{_PIXEL_LAYER}\.attentions\.0\.(sampling_offsets|attention_weights|value_proj|output_proj)": (
        rf"{_PIXELS}.encoder.layers.\1.self_attn.\2"
    ),
    rf"{_PIXEL_LAYER}\.norms\.0": rf"{_PIXELS}.encoder.layers.\1.self_attn_layer_norm",
    rf"{_PIXEL_LAYER}\.norms\.1": rf"{_PIXELS}.encoder.layers.\1.final_layer_norm",
    rf"{_PIXEL_LAYER}\.ffns\.0\.layers\.0\.0": rf"{_PIXELS}.encoder.layers.\1.fc1",
    rf"{_PIXEL_LAYER}\.ffns\.0\.layers\.1": rf"{_PIXELS}.encoder.layers.\1.fc2",
    rf"{_LAYER}\.attentions\.0\.attn\.out_proj": rf"{_MODULE}.decoder.layers.\1.cross_attn.out_proj",
    rf"{_LAYER}\.attentions\.1\.attn\.out_proj": rf"{_MODULE}.decoder.layers.\1.self_attn.out_proj",
    rf"{_LAYER}\.norms\.0": rf"{_MODULE}.decoder.layers.\1.cross_attn_layer_norm",
    rf"{_LAYER}\.norms\.1": rf"{_MODULE}.decoder.layers.\1.self_attn_layer_norm",
    rf"{_LAYER}\.norms\.2": rf"{_MODULE}.decoder.layers.\1.final_layer_norm",
    rf"{_LAYER}\.ffns\.0\.layers\.0\.0": rf"{_MODULE}.decoder.layers.\1.fc1",
    rf"{_LAYER}\.ffns\.0\.layers\.1": rf"{_MODULE}.decoder.layers.\1.fc2",
    r"panoptic_head\.transformer_decoder\.post_norm": rf"{_MODULE}.decoder.layernorm",
    r"panoptic_head\.cls_embed": "class_predictor",
}
# The same for tensors by their whole names.
_TENSORS = {
    rf"{_BLOCK}\.attn\.w_msa\.relative_position_bias_table": (
        rf"{_SWIN}.encoder.layers.\1.blocks.\2.attention.relative_position_bias.relative_position_bias_table"
    ),
    r"backbone\.norm0\.(weight|bias)": r"model.pixel_level_module.encoder.hidden_states_norms.stage1.\1",
    r"backbone\.norm1\.(weight|bias)": r"model.pixel_level_module.encoder.hidden_states_norms.stage2.\1",
    r"backbone\.norm2\.(weight|bias)": r"model.pixel_level_module.encoder.hidden_states_norms.stage3.\1",
    r"backbone\.norm3\.(weight|bias)": r"model.pixel_level_module.encoder.hidden_states_norms.stage4.\1",
    r"panoptic_head\.pixel_decoder\.level_encoding\.weight": rf"{_PIXELS}.level_embed",
    rf"{_LAYER}\.attentions\.0\.attn\.(in_proj_weight|in_proj_bias)": rf"{_MODULE}.decoder.layers.\1.cross_attn.\2",
    r"panoptic_head\.query_embed\.weight": rf"{_MODULE}.queries_embedder.weight",
    r"panoptic_head\.query_feat\.weight": rf"{_MODULE}.queries_features.weight",
    r"panoptic_head\.level_embed\.weight": rf"{_MODULE}.level_embed.weight",
    r"panoptic_head\.mask_embed\.0\.(weight|bias)": rf"{_MODULE}.decoder.mask_predictor.mask_embedder.0.0.\1",
    r"panoptic_head\.mask_embed\.2\.(weight|bias)": rf"{_MODULE}.decoder.mask_predictor.mask_embedder.1.0.\1",
    r"panoptic_head\.mask_embed\.4\.(weight|bias)": rf"{_MODULE}.decoder.mask_predictor.mask_embedder.2.0.\1",
} | {
    rf"{module}\.(weight|bias)": rf"{renamed}.\{re.compile(module).groups + 1}" for module, renamed in _RENAMED.items()
}
_FUSED = {
    rf"{_BLOCK}\.attn\.w_msa\.qkv\.(weight|bias)": rf"{_SWIN}.encoder.layers.\1.blocks.\2.attention.{{}}_proj.\3",
    rf"{_LAYER}\.attentions\.1\.attn\.in_proj_(weight|bias)": rf"{_MODULE}.decoder.layers.\1.self_attn.{{}}_proj.\2",
}
_MERGING = r"backbone\.stages\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)"
_INDEX = rf"{_BLOCK}\.attn\.w_msa\.relative_position_index"


def read(path: Path) -> State:
    """The state dict of mmdetection's file."""
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {path}",
            remedy=f"{MASK2FORMER}, and put it there",
        )
    told = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if told and not (found := sha256_of(path)).startswith(told[1]):
        raise CheckpointError(
            f"{path} is damaged: its sha256 is {found}, and begins with {told[1]} by its name",
            remedy="download it again",
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(loaded.get("state_dict", loaded))
    except (OSError, RuntimeError, EOFError, AttributeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint ({first_line(error)})", remedy=INSTEAD) from None
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds other things than tensors", remedy=INSTEAD)
    return state


def converted(state: Mapping[str, Tensor], path: Path) -> State:
    """The tensors by transformers' names; `path` is where they are from, for errors."""
    result, refused = State(), list[str]()
    for name, tensor in state.items():
        named = dict(_renamed(name, tensor))
        refused += [] if named or _is_known_index(name, tensor) else [name]
        result |= named
    if refused:
        raise CheckpointError(
            f"{path} holds {len(refused)} tensors that Mask2Former has not: {', '.join(refused[:5])}",
            remedy=INSTEAD,
        )
    return result


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for pattern, new in _TENSORS.items():
        if match := re.fullmatch(pattern, name):
            yield match.expand(new), tensor
    for pattern, new in _FUSED.items():
        if (match := re.fullmatch(pattern, name)) and len(tensor) % 3 == 0:
            yield from zip((match.expand(new).format(part) for part in "qkv"), tensor.chunk(3), strict=True)
    if (match := re.fullmatch(_MERGING, name)) and tensor.shape[-1] % 4 == 0:
        stage, module, part = match.groups()
        yield f"{_SWIN}.encoder.layers.{stage}.downsample.{module}.{part}", _merging(tensor)


def _is_known_index(name: str, tensor: Tensor) -> bool:
    """Whether it is the table that says which offset lies between two positions of a window: both compute the same."""
    if not re.fullmatch(_INDEX, name):
        return False
    size = round(len(tensor) ** 0.5)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij"))
    down, right = (axis[:, None] - axis[None] + size - 1 for axis in (rows, columns))
    return torch.equal(tensor, down * (2 * size - 1) + right)


def _merging(tensor: Tensor) -> Tensor:
    """The last axis from (channel, row, column) to (column, row, channel)."""
    merged: Tensor = tensor.unflatten(-1, (tensor.shape[-1] // 4, 2, 2)).transpose(-1, -3).flatten(-3)
    return merged


def config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The sizes that the tensors have, as arguments of transformers' Mask2FormerConfig."""
    try:
        stages = _count(state, r"backbone\.stages\.(\d+)\..*")
        block = "backbone.stages.{}.blocks.0"
        tables = [state[f"{block.format(n)}.attn.w_msa.relative_position_bias_table"] for n in range(stages)]
        patch = state["backbone.patch_embed.projection.weight"]
        mlp = state[f"{block.format(0)}.ffn.layers.0.0.weight"]
        head, pixels = "panoptic_head", "panoptic_head.pixel_decoder"
        offsets = state[f"{pixels}.encoder.layers.0.attentions.0.sampling_offsets.bias"]
        return {
            "backbone_config": {
                "model_type": "swin",
                "embed_dim": len(patch),
                "patch_size": patch.shape[-1],
                "depths": [_count(state, rf"backbone\.stages\.{n}\.blocks\.(\d+)\..*") for n in range(stages)],
                "num_heads": [table.shape[1] for table in tables],
                "window_size": (round(len(tables[0]) ** 0.5) + 1) // 2,
                "mlp_ratio": len(mlp) / mlp.shape[1],
                "out_features": [f"stage{n + 1}" for n in range(stages)],
            },
            "feature_size": len(state[f"{pixels}.input_convs.0.conv.weight"]),
            "mask_feature_size": len(state[f"{pixels}.mask_feature.weight"]),
            "hidden_dim": state[f"{head}.query_feat.weight"].shape[1],
            "encoder_feedforward_dim": len(state[f"{pixels}.encoder.layers.0.ffns.0.layers.0.0.weight"]),
            "dim_feedforward": len(state[f"{head}.transformer_decoder.layers.0.ffns.0.layers.0.0.weight"]),
            "encoder_layers": _count(state, _PIXEL_LAYER + r"\..*"),
            "decoder_layers": 1 + _count(state, _LAYER + r"\..*"),  # transformers counts one that has no layer
            "num_attention_heads": len(offsets) // (3 * 4 * 2),  # levels, points, coordinates
            "num_queries": len(state[f"{head}.query_feat.weight"]),
            "num_labels": len(state[f"{head}.cls_embed.weight"]) - 1,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path} has no tensor {first_line(error)}", remedy=INSTEAD) from None


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.fullmatch(pattern, name))})

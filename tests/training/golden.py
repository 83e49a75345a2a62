"""Arrays that the published implementation computed, and the network that they were computed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.model import ModelConfig, PixNerd
from training.model.published import reference

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: json.loads(str(arrays[key])) if key == "cfg" else torch.from_numpy(arrays[key]) for key in arrays}


def weights(arrays: dict[str, Any], prefix: str = "w/") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def network(name: str, *, fixed_grid: bool = False) -> PixNerd:
    arrays = load(name)
    config = config_of(arrays["cfg"], fixed_grid=fixed_grid)
    net = PixNerd(config)
    net.load_state_dict(reference.from_reference(weights(arrays), config, net.state_dict()))
    return net


def config_of(cfg: dict[str, Any], *, fixed_grid: bool = False) -> ModelConfig:
    """Settings from the reference's own arguments; the published networks' fixed choices go with their task."""
    common = {
        "image_size": 16,
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
        round_text=True,  # of no effect on features that are given
    )


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())

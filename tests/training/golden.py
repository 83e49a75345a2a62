"""Arrays that the published implementation computed, and the network that they were computed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.model import PixNerd, reference

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: json.loads(str(arrays[key])) if key == "cfg" else torch.from_numpy(arrays[key]) for key in arrays}


def weights(arrays: dict[str, Any], prefix: str = "w/") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def network(name: str, *, fixed_grid: bool = False) -> PixNerd:
    arrays = load(name)
    config = reference.config_of(arrays["cfg"], image_size=16, fixed_grid=fixed_grid)
    net = PixNerd(config)
    net.load_state_dict(reference.from_reference(weights(arrays), config, net.state_dict()))
    return net


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())

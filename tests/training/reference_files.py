"""Files as the published code writes them, made from the arrays that it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training import golden

State = dict[str, Tensor]


def state(name: str, *, head: bool = False) -> State:
    """Both networks of a file, the one as it was trained in bf16 and its mean in fp32, and perhaps the head."""
    weights = golden.weights(golden.load(name))
    raw = {f"denoiser.{key}": (tensor + 1).bfloat16() for key, tensor in weights.items()}
    mean = {f"ema_denoiser.{key}": tensor for key, tensor in weights.items()}
    return raw | mean | (repa_head() if head else {})


def repa_head() -> State:
    found = golden.weights(golden.load("objective"), "in/proj.0.")
    return {f"diffusion_trainer.proj.0.{key}": tensor for key, tensor in found.items()}


def write(path: Path, state: dict[str, Any]) -> Path:
    """With some of what a Lightning file has beside its state_dict."""
    others = {"epoch": 3, "global_step": 200, "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}]}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5", **others}, path)
    return path


def same(one: State, two: State) -> bool:
    """Bit for bit, and of the same types."""
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and one[name].shape == two[name].shape and torch.equal(one[name], two[name])
        for name in one
    )


def part(state: State, prefix: str) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}

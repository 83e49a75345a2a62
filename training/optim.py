"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), and the learning rate as a pure function of the step, so that a
resumed run needs no scheduler's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from infra.config import Settings


class OptimSettings(Settings):
    lr: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="norm at which gradients are clipped; 0: never")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = "constant"
    final: float = Field(0.0, ge=0, le=1, description="cosine: the share of lr that is left at the last step")


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """The rate at step number `step` of `steps`, counted from 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.final + (1 - settings.final) * cosine)


def adamw(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only, not on gains, biases and position tables."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if settings.weight_decay:
        groups = [
            {"params": [p for p in trained if p.ndim == 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=0.0, fused=True)

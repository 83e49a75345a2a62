"""The optimiser's settings, what it treats alike, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from infra.config import Settings
from training.muon import Muon

TEXT = "text."  # what the names of the text encoder's parameters begin with


class OptimSettings(Settings):
    lr: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="norm at which gradients are clipped; 0: never")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="what follows the warm-up")
    final: float = Field(0.0, ge=0, le=1, description="cosine, linear: the share of lr that is left at the last step")
    matrices: Literal["adamw", "muon"] = Field("adamw", description="what moves the weight matrices of the blocks")
    text_lr: float = Field(1.0, ge=0, description="the share of lr for the layers of the text encoder")


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """The rate at step number `step` of `steps`, counted from 0; a resumed run needs no scheduler's state."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.final + (1 - settings.final) * left)


def optimiser(parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) or Muon, with weight decay on matrices only."""
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            muon = settings.matrices == "muon" and parameter.ndim == 2 and is_in_a_block(name)
            decay = settings.weight_decay if parameter.ndim == 2 else 0.0
            share = settings.text_lr if name.startswith(TEXT) else 1.0
            groups.setdefault((muon, decay, share), []).append(parameter)
    kind = Muon if settings.matrices == "muon" else torch.optim.AdamW
    return kind(
        [{"params": members, "muon": m, "weight_decay": d, "share": s} for (m, d, s), members in groups.items()],
        lr=settings.lr,
        betas=settings.betas,
        fused=True,
    )


def is_in_a_block(name: str) -> bool:
    """Of one of the repeated blocks of a network, which its name numbers: `net.trunk.3.attn.out.weight`."""
    return re.search(r"\.\d+\.", name) is not None

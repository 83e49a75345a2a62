"""Time, label and text embeddings, rotary positions, and the condition that a network is called with.

Shapes: B images, R text rows (each may serve several images), T text tokens, E text features, H hidden, N patches.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.model.blocks import Block, RMSNorm
from training.model.presets import ModelConfig


class Text(NamedTuple):
    """Captions as features. `rows` says which row each image reads, so that text shared by images is worked once."""

    features_RTE: Tensor
    mask_RT: Tensor | None = None
    rows_B: Tensor | None = None


class RefinedText(NamedTuple):
    """Text after its own blocks, at one time per row: what the image blocks attend to."""

    y_RTH: Tensor
    mask_RT: Tensor | None
    rows_B: Tensor | None


# Labels [B], bare features [B, T, E], or Text.
Condition = Tensor | Text


class TimeEmbedding(nn.Module):
    """t in [0, 1], not rescaled: 128 frequencies from 1 down to 1/10, cosines then sines, and a two-layer MLP."""

    features = 256

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(self.features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.features // 2
        exponents = torch.arange(half, device=t_B.device, dtype=torch.float32)
        angles_BF = t_B.float()[:, None] * torch.exp(exponents * (-math.log(10) / half))
        features_BF = torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1).to(self.fc1.weight.dtype)
        out_BH: Tensor = self.fc2(F.silu(self.fc1(features_BF)))
        return out_BH


class TextEmbedding(nn.Module):
    """Encoder features -> hidden size, learnt positions, and blocks over the text alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.text_dim, config.hidden)
        self.norm = RMSNorm(config.hidden, weight_in_fp32=config.norm_weight_in_fp32)
        self.positions = nn.Parameter(torch.empty(1, config.text_tokens, config.hidden))
        self.blocks = nn.ModuleList(Block(config, rotary=False, text=False) for _ in range(config.text_blocks))
        self.masked = config.text_padding == "masked"

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions)

    def forward(self, text: Text, time_BH: Tensor) -> RefinedText:
        features_RTE, mask_RT, rows_B = text
        assert features_RTE.shape[1] <= self.positions.shape[1], "more text tokens than the network has positions for"
        y_RTH = self.norm(self.proj(features_RTE.to(self.proj.weight.dtype)))
        y_RTH = y_RTH + self.positions[:, : y_RTH.shape[1]].to(y_RTH.dtype)
        mask_RT = mask_RT.bool() if self.masked and mask_RT is not None else None
        # Images that share a row share its time, so whichever of them writes last writes the same.
        time_RH = time_BH if rows_B is None else time_BH.new_zeros(len(y_RTH), time_BH.shape[1]).index_copy(0, rows_B, time_BH)
        cond_RH = F.silu(time_RH)
        key_mask = None if mask_RT is None else mask_RT[:, None, None, :]
        for block in self.blocks:
            y_RTH = block(y_RTH, cond_RH, mask=key_mask)
        return RefinedText(y_RTH, mask_RT, rows_B)


class RotaryTable(NamedTuple):
    """cos and sin of every position's d/2 angles, [N, d/2]; pairs (2i, 2i+1) of a head are rotated by angle i."""

    cos: Tensor
    sin: Tensor


@functools.lru_cache(maxsize=64)
def rotary_table(rows: int, columns: int, head_dim: int, extent: float | None, device: torch.device) -> RotaryTable:
    """Angles x f0, y f0, x f1, y f1, ... over the grid, row-major; end points are included."""
    with torch.inference_mode(False), torch.no_grad():
        # Text to image counts x to the number of rows and y to that of columns: so the published weights learnt it.
        x_end, y_end = (rows, columns) if extent is None else (extent, extent)
        x = torch.linspace(0, x_end, columns, dtype=torch.float64)
        y = torch.linspace(0, y_end, rows, dtype=torch.float64)
        j = torch.arange(head_dim // 4, dtype=torch.float64)
        f = 10000.0 ** (-4 * j / head_dim)
        y_grid, x_grid = torch.meshgrid(y, x, indexing="ij")
        angles = torch.stack([x_grid.reshape(-1, 1) * f, y_grid.reshape(-1, 1) * f], dim=-1).flatten(1)
        return RotaryTable(angles.cos().float().to(device), angles.sin().float().to(device))

"""Time, label and text embeddings, rotary positions, and the condition that a network is called with.

Shapes: B images, R text rows (each may serve several images), T text tokens, E text features, H hidden, N patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.model.blocks import Block, RMSNorm
from training.model.presets import ModelConfig
from training.model.tables import constant_table


class Text(NamedTuple):
    """Captions as features. `rows` says which row each image reads, so that text shared by images is worked once.

    The network's own text blocks know the time, so images that share a row must share their time too.
    """

    features_RTE: Tensor
    mask_RT: Tensor | None = None
    rows_B: Tensor | None = None


class TextTokens(NamedTuple):
    """Text inside of the network: before its own blocks the same at every time, after them what the image attends to.

    The mask is None where pads are attended to like words.
    """

    y_RTH: Tensor
    mask_RT: Tensor | None
    rows_B: Tensor | None


# Labels [B], bare features [B, T, E], or Text.
Condition = Tensor | Text
# What `PixNerd.embed` makes of it.
Embedded = Tensor | TextTokens


def as_text(condition: Condition) -> Text:
    return condition if isinstance(condition, Text) else Text(condition)


def shown(text: Text) -> Tensor:
    """Which tokens are words, [R, T]; without a mask all of them are."""
    if text.mask_RT is None:
        return torch.ones(text.features_RTE.shape[:2], dtype=torch.bool, device=text.features_RTE.device)
    return text.mask_RT.bool()


def join(first: Condition, second: Condition) -> Condition:
    """The conditions of two batches, one behind the other; a single caption of the second serves as many images."""
    if not isinstance(first, Text) and not first.is_floating_point():
        assert isinstance(second, Tensor)
        return torch.cat([first, second.to(first).expand(len(first))])
    one, two = as_text(first), as_text(second)
    rows1, rows2 = _rows(one), _rows(two)
    if len(rows2) == 1:
        rows2 = rows2.expand(len(rows1))
    features = torch.cat([one.features_RTE, two.features_RTE.to(one.features_RTE)])
    mask = None if one.mask_RT is None and two.mask_RT is None else torch.cat([shown(one), shown(two)])
    return Text(features, mask, torch.cat([rows1, rows2 + len(one.features_RTE)]))


def _rows(text: Text) -> Tensor:
    return torch.arange(len(text.features_RTE), device=text.features_RTE.device) if text.rows_B is None else text.rows_B


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

    def embed(self, text: Text) -> TextTokens:
        """The part that does not depend on the time."""
        features_RTE, mask_RT, rows_B = text
        assert features_RTE.shape[1] <= self.positions.shape[1], "more text tokens than the network has positions for"
        y_RTH = self.norm(self.proj(features_RTE.to(self.proj.weight.dtype)))
        y_RTH = y_RTH + self.positions[:, : y_RTH.shape[1]].to(y_RTH.dtype)
        return TextTokens(y_RTH, mask_RT.bool() if self.masked and mask_RT is not None else None, rows_B)

    def forward(self, tokens: TextTokens, time_BH: Tensor) -> TextTokens:
        y_RTH, mask_RT, rows_B = tokens
        if rows_B is not None:
            time_BH = time_BH[_speakers(rows_B, len(y_RTH))]
        cond_RH = F.silu(time_BH)
        key_mask = None if mask_RT is None else mask_RT[:, None, None, :]
        for block in self.blocks:
            y_RTH = block(y_RTH, cond_RH, mask=key_mask)
        return TextTokens(y_RTH, mask_RT, rows_B)


def _speakers(rows_B: Tensor, rows: int) -> Tensor:
    """An image for each row: those that share one share their time, so any of them may stand for it."""
    images_B = torch.arange(len(rows_B), device=rows_B.device)
    return rows_B.new_zeros(rows).scatter(0, rows_B, images_B)


def check_times(embedded: Embedded, t_B: Tensor) -> None:
    """Not in a compiled network, where to look would break the graph."""
    if torch.compiler.is_compiling() or not isinstance(embedded, TextTokens) or embedded.rows_B is None:
        return
    rows_B = embedded.rows_B
    if not torch.equal(t_B[_speakers(rows_B, len(embedded.y_RTH))][rows_B], t_B):
        raise ValueError("images that share a row of text must have the same time")


class RotaryTable(NamedTuple):
    """cos and sin of every position's d/2 angles, [N, d/2]; pairs (2i, 2i+1) of a head are rotated by angle i."""

    cos: Tensor
    sin: Tensor


@constant_table
def rotary_table(rows: int, columns: int, head_dim: int, extent: float | None, device: torch.device) -> RotaryTable:
    """Angles x f0, y f0, x f1, y f1, ... over the grid, row-major; end points are included."""
    # Text to image counts x to the number of rows and y to that of columns: so the published weights learnt it.
    x_end, y_end = (rows, columns) if extent is None else (extent, extent)
    x = torch.linspace(0, x_end, columns, dtype=torch.float64)
    y = torch.linspace(0, y_end, rows, dtype=torch.float64)
    j = torch.arange(head_dim // 4, dtype=torch.float64)
    f = 10000.0 ** (-4 * j / head_dim)
    y_grid, x_grid = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack([x_grid.reshape(-1, 1) * f, y_grid.reshape(-1, 1) * f], dim=-1).flatten(1)
    return RotaryTable(angles.cos().float().to(device), angles.sin().float().to(device))

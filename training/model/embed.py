"""The embeddings of time and text.

Shapes: B images, R text rows (each may serve several images), T text tokens, E text features, H hidden.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.model.blocks import Block, RMSNorm
from training.model.condition import Embedded, Text, TextTokens
from training.model.presets import ModelConfig


class TimeEmbedding(nn.Module):
    """Cosines and sines of t (in [0, 1], not rescaled) at 128 frequencies from 1 towards 1/10, then a two-layer MLP."""

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
        return cast(Tensor, self.fc2(F.silu(self.fc1(features_BF))))


class TextEmbedding(nn.Module):
    """Projects the encoder's features, adds learnt positions, and refines them with blocks over the text alone."""

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
        """The part of the text embedding that does not depend on the time."""
        features_RTE, mask_RT, rows_B = text
        assert features_RTE.shape[1] <= self.positions.shape[1], "more text tokens than the network has positions for"
        y_RTH = self.norm(self.proj(features_RTE.to(self.proj.weight.dtype)))
        y_RTH = y_RTH + self.positions[:, : y_RTH.shape[1]].to(y_RTH.dtype)
        return TextTokens(y_RTH, mask_RT.bool() if self.masked and mask_RT is not None else None, rows_B)

    def forward(self, tokens: TextTokens, time_BH: Tensor) -> TextTokens:
        y_RTH, mask_RT, rows_B = tokens
        if rows_B is not None:
            time_BH = time_BH[_image_of_row(rows_B, len(y_RTH))]
        cond_RH = F.silu(time_BH)
        key_mask = None if mask_RT is None else mask_RT[:, None, None, :]
        for block in self.blocks:
            y_RTH = block(y_RTH, cond_RH, mask=key_mask)
        return TextTokens(y_RTH, mask_RT, rows_B)


def _image_of_row(rows_B: Tensor, rows: int) -> Tensor:
    """The index of one image for each row; any will do, as images that share a row have the same time."""
    images_B = torch.arange(len(rows_B), device=rows_B.device)
    return rows_B.new_zeros(rows).scatter(0, rows_B, images_B)


def check_times(embedded: Embedded, t_B: Tensor) -> None:
    """Raises if images that share a row of text differ in time, except in a compiled network, whose graph it breaks."""
    if torch.compiler.is_compiling() or not isinstance(embedded, TextTokens) or embedded.rows_B is None:
        return
    rows_B = embedded.rows_B
    if not torch.equal(t_B[_image_of_row(rows_B, len(embedded.y_RTH))][rows_B], t_B):
        raise ValueError("images that share a row of text must have the same time")

"""The neural field (PixNerd, arXiv 2507.23268): a small MLP over a patch's pixels, with weights predicted per patch.

Shapes: B images, N patches, P = B N, K pixels of a patch, C field channels, I = r C inner, H hidden,
W = 2 C I weights.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.kernels import field_product
from training.model.blocks import RMSNorm
from training.model.presets import ModelConfig
from training.model.tables import constant_table

CODE = 64  # values per pixel in every coordinate code


@constant_table
def coordinates(kind: str, height: int, width: int, device: torch.device) -> Tensor:
    """The code of each pixel of a height x width patch, row-major: [K, 64]. Any patch size spans the same range."""
    end = 16.0 if kind == "cosine" else 1.0
    y, x = torch.meshgrid(
        torch.linspace(0, end, height, dtype=torch.float64),
        torch.linspace(0, end, width, dtype=torch.float64),
        indexing="ij",
    )
    x_K1, y_K1 = x.reshape(-1, 1), y.reshape(-1, 1)
    return _CODES[kind](x_K1, y_K1).float().to(device)


def _cosine(x_K1: Tensor, y_K1: Tensor) -> Tensor:
    """cos(x f_0), cos(y f_0), cos(x f_1), ... with f_k = 10000^(-4k/128), as in the published text-to-image code."""
    f = 10000.0 ** (-4 * torch.arange(CODE // 2, dtype=torch.float64) / (2 * CODE))
    return torch.stack([(x_K1 * f).cos(), (y_K1 * f).cos()], dim=-1).flatten(1)


def _dct(x_K1: Tensor, y_K1: Tensor) -> Tensor:
    """cos(pi x a) cos(pi y b) / (1 + a b) for 8 x 8 frequencies a, b from 0 to 8: PixNerd's DCT basis."""
    f = torch.linspace(0, 8, 8, dtype=torch.float64)
    a, b = f[:, None], f[None, :]
    return ((math.pi * x_K1[:, :, None] * a).cos() * (math.pi * y_K1[:, :, None] * b).cos() / (1 + a * b)).flatten(1)


def _sincos(x_K1: Tensor, y_K1: Tensor) -> Tensor:
    """sin and cos of 2^l pi x and 2^l pi y, l = 0..15: the ablation of PixNerd, Eq. 7, as we read it."""
    f = math.pi * 2.0 ** torch.arange(CODE // 4, dtype=torch.float64)
    x, y = x_K1 * f, y_K1 * f
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


_CODES = {"cosine": _cosine, "dct": _dct, "sincos": _sincos}


class FieldBlock(nn.Module):
    """y = x + W2 SiLU(W1 norm(x)) with unit columns of W1, and of W2 unless `field_norm` is fc1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.field_channels
        self.normalise2 = config.field_norm != "fc1"
        self.weights = nn.Linear(config.hidden, 2 * channels * channels * config.field_ratio)
        # In fp32 for both tasks, because the kernels multiply this norm's weight into W1.
        self.norm = RMSNorm(channels, weight_in_fp32=True)

    def forward(self, x_PKC: Tensor, s_PH: Tensor) -> Tensor:
        return field_product(x_PKC, self.norm.weight, self.weights(s_PH), self.normalise2)


class Field(nn.Module):
    """From each pixel's noisy RGB and coordinate code, through the field blocks, to three channels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.field_channels
        self.code = config.coordinate_code
        self.pixel_in = nn.Linear(3 + CODE, channels)
        self.blocks = nn.ModuleList(FieldBlock(config) for _ in range(config.field_blocks))
        norm_out = config.field_norm == "fc1_fc2_out"
        self.norm = RMSNorm(channels, weight_in_fp32=config.norm_weight_in_fp32) if norm_out else nn.Identity()
        self.out = nn.Linear(channels, 3)

    def forward(self, pixels_PK3: Tensor, s_PH: Tensor, height: int, width: int) -> Tensor:
        code_KD = coordinates(self.code, height, width, pixels_PK3.device).to(pixels_PK3.dtype)
        # The code is the same for every patch, so its part of the first layer is computed once.
        rgb, code = self.pixel_in.weight.split([3, CODE], dim=1)
        x_PKC = F.linear(pixels_PK3, rgb) + F.linear(code_KD, code, self.pixel_in.bias)
        for block in self.blocks:
            x_PKC = block(x_PKC, s_PH)
        return cast(Tensor, self.out(self.norm(x_PKC)))


class LinearHead(nn.Module):
    """The paper's baseline without a field: one linear layer from a patch's token to its pixels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden, weight_in_fp32=config.norm_weight_in_fp32)
        self.out = nn.Linear(config.hidden, 3 * config.patch_size**2)

    def forward(self, x_PH: Tensor) -> Tensor:
        return cast(Tensor, self.out(self.norm(x_PH)).unflatten(-1, (3, -1)).transpose(1, 2))

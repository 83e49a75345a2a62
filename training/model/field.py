"""The neural field: each patch's pixels go through a small MLP whose weights the trunk makes for that patch.

Shapes: B images, N patches, P = B N, K pixels of a patch, C field channels, I = r C inner, H hidden,
W = 2 C I weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.kernels import field_product
from training.model.blocks import RMSNorm
from training.model.presets import ModelConfig
from training.model.tables import constant_table

CODE = 64  # values of every coordinate code


@constant_table
def coordinates(kind: str, height: int, width: int, device: torch.device) -> Tensor:
    """The code of every pixel of a height x width patch, row-major: [K, 64]. It always spans the same range."""
    end = 16.0 if kind == "cosine" else 1.0
    y, x = torch.meshgrid(
        torch.linspace(0, end, height, dtype=torch.float64),
        torch.linspace(0, end, width, dtype=torch.float64),
        indexing="ij",
    )
    x_K1, y_K1 = x.reshape(-1, 1), y.reshape(-1, 1)
    return _CODES[kind](x_K1, y_K1).float().to(device)


def _cosine(x_K1: Tensor, y_K1: Tensor) -> Tensor:
    f = 10000.0 ** (-4 * torch.arange(CODE // 2, dtype=torch.float64) / (2 * CODE))
    return torch.stack([(x_K1 * f).cos(), (y_K1 * f).cos()], dim=-1).flatten(1)


def _dct(x_K1: Tensor, y_K1: Tensor) -> Tensor:
    f = torch.linspace(0, 8, 8, dtype=torch.float64)
    a, b = f[:, None], f[None, :]
    return ((math.pi * x_K1[:, :, None] * a).cos() * (math.pi * y_K1[:, :, None] * b).cos() / (1 + a * b)).flatten(1)


def _sincos(x_K1: Tensor, y_K1: Tensor) -> Tensor:
    f = math.pi * 2.0 ** torch.arange(CODE // 4, dtype=torch.float64)
    x, y = x_K1 * f, y_K1 * f
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


_CODES = {"cosine": _cosine, "dct": _dct, "sincos": _sincos}


class FieldBlock(nn.Module):
    """y = x + W2 SiLU(W1 norm(x)); W1's columns have unit length, and W2's as well unless only FC1 is normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.field_channels
        self.normalise2 = config.field_norm != "fc1"
        self.weights = nn.Linear(config.hidden, 2 * channels * channels * config.field_ratio)
        # For both tasks: the product's kernels fold this norm's weight into W1, in fp32.
        self.norm = RMSNorm(channels, weight_in_fp32=True)

    def forward(self, x_PKC: Tensor, s_PH: Tensor) -> Tensor:
        return field_product(x_PKC, self.norm.weight, self.weights(s_PH), self.normalise2)


class Field(nn.Module):
    """Noisy RGB and a coordinate code per pixel -> field blocks -> three channels per pixel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.field_channels
        self.code = config.coordinate_code
        self.pixel_in = nn.Linear(3 + CODE, channels)
        self.blocks = nn.ModuleList(FieldBlock(config) for _ in range(config.field_blocks))
        norm_out = config.field_norm == "fc1_fc2_out"
        self.norm = RMSNorm(channels, weight_in_fp32=config.norm_weight_in_fp32) if norm_out else nn.Identity()
        self.out = nn.Linear(channels, 3)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, pixels_PK3: Tensor, s_PH: Tensor, height: int, width: int) -> Tensor:
        code_KD = coordinates(self.code, height, width, pixels_PK3.device).to(pixels_PK3.dtype)
        # The code is the same for every patch: its part of the first layer is worked out once.
        rgb, code = self.pixel_in.weight.split([3, CODE], dim=1)
        x_PKC = F.linear(pixels_PK3, rgb) + F.linear(code_KD, code, self.pixel_in.bias)
        for block in self.blocks:
            x_PKC = block(x_PKC, s_PH)
        out_PK3: Tensor = self.out(self.norm(x_PKC))
        return out_PK3


class LinearHead(nn.Module):
    """The baseline without a field: the patch's token gives all of its pixels at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden, weight_in_fp32=config.norm_weight_in_fp32)
        self.out = nn.Linear(config.hidden, 3 * config.patch_size**2)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_PH: Tensor) -> Tensor:
        out_PK3: Tensor = self.out(self.norm(x_PH)).unflatten(-1, (3, -1)).transpose(1, 2)
        return out_PK3

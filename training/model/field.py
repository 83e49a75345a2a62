"""The neural field: each patch's pixels go through a small MLP whose weights the trunk makes for that patch.

Shapes: B images, N patches, P = B N, K pixels of a patch, C field channels, I = r C inner, H hidden,
W = 2 C I weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from training.model.blocks import EPS, RMSNorm
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


def field_product(x_PKC: Tensor, norm: RMSNorm, w_PW: Tensor, normalise2: bool) -> Tensor:
    """x + SiLU(norm(x) W1) W2 with columns of unit length, step by step: what a compiler fuses, and what is meant."""
    w1_PCI, w2_PIC = _matrices(w_PW, x_PKC.shape[-1])
    w1_PCI = F.normalize(w1_PCI, dim=-2)
    w2_PIC = F.normalize(w2_PIC, dim=-2) if normalise2 else w2_PIC
    return torch.baddbmm(x_PKC, F.silu(torch.bmm(norm(x_PKC), w1_PCI)), w2_PIC)


class TiledFieldProduct(torch.autograd.Function):
    """The same for a CPU, a few patches at a time so that everything between in and out stays in the cache.

    Nothing in between is kept: backward works it out again, tile by tile.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
        ctx.save_for_backward(x_PKC, gain_C, w_PW)
        ctx.normalise2 = normalise2  # type: ignore[attr-defined]
        w1_PCI, w2_PIC = _matrices(w_PW, x_PKC.shape[-1])
        out_PKC = torch.empty_like(x_PKC)
        for tile in _tiles(x_PKC, w1_PCI):
            x, w2 = x_PKC[tile], w2_PIC[tile]
            w1, _ = _unit(w1_PCI[tile])
            if normalise2:
                w2, _ = _unit(w2)
            a = torch.bmm(_scaled(x)[0].mul_(gain_C), w1)
            torch.baddbmm(x, F.silu(a, inplace=True), w2, out=out_PKC[tile])
        return out_PKC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (g_PKC,) = grads
        x_PKC, gain_C, w_PW = ctx.saved_tensors
        g_x, g_gain, g_w = torch.empty_like(x_PKC), torch.zeros_like(gain_C), torch.empty_like(w_PW)
        w1_PCI, w2_PIC = _matrices(w_PW, x_PKC.shape[-1])
        g_w1, g_w2 = _matrices(g_w, x_PKC.shape[-1])
        for tile in _tiles(x_PKC, w1_PCI):
            g, w2, length2 = g_PKC[tile], w2_PIC[tile], None
            w1, length1 = _unit(w1_PCI[tile])
            if ctx.normalise2:
                w2, length2 = _unit(w2)
            x, rms = _scaled(x_PKC[tile])
            normed = x * gain_C
            a = torch.bmm(normed, w1)
            g_a = torch.ops.aten.silu_backward(torch.bmm(g, w2.mT), a)
            g_w2[tile] = _unit_backward(torch.bmm(F.silu(a, inplace=True).mT, g), w2, length2)
            g_w1[tile] = _unit_backward(torch.bmm(normed.mT, g_a), w1, length1)
            g_normed = torch.bmm(g_a, w1.mT)
            g_gain += (g_normed * x).sum((0, 1))
            g_scaled = g_normed.mul_(gain_C)
            along = (g_scaled * x).mean(-1, keepdim=True)
            torch.add(g, g_scaled.addcmul_(x, along, value=-1).div_(rms), out=g_x[tile])
        return g_x, g_gain, g_w, None


def _matrices(w_PW: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The two matrices of each patch, as views: W1 [P, C, I] and W2 [P, I, C]."""
    w1, w2 = w_PW.chunk(2, dim=-1)
    return w1.unflatten(-1, (channels, -1)), w2.unflatten(-1, (-1, channels))


def _tiles(x_PKC: Tensor, w1_PCI: Tensor) -> Iterator[slice]:
    """Patches of which no step's values take more than a quarter of a megabyte."""
    per_patch = max(x_PKC.shape[1] * w1_PCI.shape[2], w1_PCI[0].numel()) * x_PKC.element_size()
    size = max(1, 2**18 // per_patch)
    return (slice(start, start + size) for start in range(0, len(x_PKC), size))


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and that."""
    rms = (x * x).mean(-1, keepdim=True).add_(EPS).sqrt_()
    return x / rms, rms


def _unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit length, and their lengths."""
    length = (w * w).sum(-2, keepdim=True).sqrt_().clamp_(min=1e-12)
    return w / length, length


def _unit_backward(g: Tensor, unit: Tensor, length: Tensor | None) -> Tensor:
    """The part of g across each column, over the column's length; g itself where nothing was normalised."""
    if length is None:
        return g
    return g.addcmul_(unit, (g * unit).sum(-2, keepdim=True), value=-1).div_(length)


class FieldBlock(nn.Module):
    """y = x + W2 SiLU(W1 norm(x)); W1's columns have unit length, and W2's as well unless only FC1 is normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.field_channels
        self.normalise2 = config.field_norm != "fc1"
        self.weights = nn.Linear(config.hidden, 2 * channels * channels * config.field_ratio)
        self.norm = RMSNorm(channels, weight_in_fp32=config.norm_weight_in_fp32)

    def forward(self, x_PKC: Tensor, s_PH: Tensor) -> Tensor:
        w_PW = self.weights(s_PH)
        # Low precision rounds in an order of its own, and a compiler tiles by itself: both take the plain form.
        if x_PKC.is_cpu and x_PKC.dtype != torch.bfloat16:
            from training.kernels import tiled

            out_PKC: Tensor = tiled.field_product(x_PKC, self.norm.weight, w_PW, self.normalise2)
            return out_PKC
        return field_product(x_PKC, self.norm, w_PW, self.normalise2)


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

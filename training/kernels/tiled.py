"""The field's product for a CPU: a few patches at a time, so that everything between in and out stays in the cache.

Nothing in between is kept: backward works it out again, tile by tile. Shapes as in the twin, `plain.field_product`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.kernels.plain import EPS, matrices

TILE = 2**20  # bytes of the largest thing between in and out


@torch.library.custom_op("pixnerd::tiled_field_product", mutates_args=())
def field_product(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    out_PKC = _like(x_PKC)
    w1_PCI, w2_PIC = matrices(w_PW, x_PKC.shape[-1])
    for tile in _tiles(x_PKC, w1_PCI):
        x, w2 = x_PKC[tile], w2_PIC[tile]
        # The norm's gain goes into W1, which is smaller than x.
        w1 = _unit(w1_PCI[tile])[0].mul_(gain_C[:, None])
        if normalise2:
            w2, _ = _unit(w2)
        inner = F.silu(torch.bmm(_normed(x)[0], w1), inplace=True)
        torch.baddbmm(x, inner, w2, out=out_PKC[tile])
    return out_PKC


@torch.library.custom_op("pixnerd::tiled_field_product_backward", mutates_args=())
def _backward(
    g_PKC: Tensor, x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g_x, g_gain, g_w = _like(x_PKC), torch.zeros_like(gain_C), _like(w_PW)
    w1_PCI, w2_PIC = matrices(w_PW, x_PKC.shape[-1])
    g_w1, g_w2 = matrices(g_w, x_PKC.shape[-1])
    for tile in _tiles(x_PKC, w1_PCI):
        g, w2, inverse2 = g_PKC[tile], w2_PIC[tile], None
        unit1, inverse1 = _unit(w1_PCI[tile])
        w1 = unit1 * gain_C[:, None]
        if normalise2:
            w2, inverse2 = _unit(w2)
        x, inverse = _normed(x_PKC[tile])
        a = torch.bmm(x, w1)
        g_a = torch.ops.aten.silu_backward(torch.bmm(g, w2.mT), a)
        g_unit2 = torch.bmm(F.silu(a, inplace=True).mT, g, out=g_w2[tile])
        if inverse2 is not None:
            _unit_backward_(g_unit2, w2, inverse2)
        g_unit1 = torch.bmm(x.mT, g_a, out=g_w1[tile])
        g_gain += (g_unit1 * unit1).sum((0, 2))
        _unit_backward_(g_unit1.mul_(gain_C[:, None]), unit1, inverse1)
        g_normed = torch.bmm(g_a, w1.mT)
        along = (g_normed * x).mean(-1, keepdim=True)
        torch.addcmul(g, g_normed.addcmul_(x, along, value=-1), inverse, out=g_x[tile])
    return g_x, g_gain, g_w


@field_product.register_fake
def _(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    return _like(x_PKC)


@_backward.register_fake
def _(g_PKC: Tensor, x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x_PKC), _like(gain_C), _like(w_PW)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.normalise2 = inputs[3]


def _gradients(ctx: Any, g_PKC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_backward(g_PKC, *ctx.saved_tensors, ctx.normalise2), None


field_product.register_autograd(_gradients, setup_context=_save)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tiles(x_PKC: Tensor, w1_PCI: Tensor) -> Iterator[slice]:
    per_patch = max(x_PKC.shape[1], w1_PCI.shape[1]) * w1_PCI.shape[2] * x_PKC.element_size()
    size = max(1, TILE // per_patch)
    return (slice(start, start + size) for start in range(0, len(x_PKC), size))


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and what it was multiplied with."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = length.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
    return x * inverse, inverse


def _unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit length, and what they were multiplied with."""
    inverse = (w * w).sum(-2, keepdim=True).sqrt_().clamp_(min=1e-12).reciprocal_()
    return w * inverse, inverse


def _unit_backward_(g: Tensor, unit: Tensor, inverse: Tensor) -> None:
    """In place: the part of g across each column, over the column's length."""
    g.addcmul_(unit, (g * unit).sum(-2, keepdim=True), value=-1).mul_(inverse)

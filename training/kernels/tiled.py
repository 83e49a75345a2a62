"""The field's product for a CPU: a few patches (a tile) at a time, so that intermediate values stay in the cache.

They are not saved: backward recomputes them, tile by tile. Shapes as in `plain.field_product`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from training.kernels.operators import empty_like, operator
from training.kernels.plain import EPS, matrices

TILE = 2**20  # bytes of a tile's largest intermediate value


def _forward(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    out_PKC = empty_like(x_PKC)
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


def _backward(
    g_PKC: Tensor, x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g_x, g_gain, g_w = empty_like(x_PKC), torch.zeros_like(gain_C), empty_like(w_PW)
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


field_product = operator("tiled_field_product", _forward, _backward, gradients=3)


def _tiles(x_PKC: Tensor, w1_PCI: Tensor) -> Iterator[slice]:
    per_patch = max(x_PKC.shape[1], w1_PCI.shape[1]) * w1_PCI.shape[2] * x_PKC.element_size()
    size = max(1, TILE // per_patch)
    return (slice(start, start + size) for start in range(0, len(x_PKC), size))


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and the factor 1 / rms(x)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = length.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
    return x * inverse, inverse


def _unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """w with columns of unit length, and the factors that make them so."""
    inverse = (w * w).sum(-2, keepdim=True).sqrt_().clamp_(min=1e-12).reciprocal_()
    return w * inverse, inverse


def _unit_backward_(g: Tensor, unit: Tensor, inverse: Tensor) -> None:
    """The gradient through `_unit`, in place: g without its component along each column, over the column's length."""
    g.addcmul_(unit, (g * unit).sum(-2, keepdim=True), value=-1).mul_(inverse)

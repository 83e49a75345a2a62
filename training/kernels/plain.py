"""What each kernel computes, in ordinary PyTorch: torch.compile fuses it, and the kernels are tested against it.

Shapes: B images, N tokens, H hidden, h heads, d head size, D = d/2 pairs; P patches, K pixels of a patch, C field
channels, I = r C inner, W = 2 C I weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # in the denominator of every norm


def rms_norm(x: Tensor, weight: Tensor, weight_in_fp32: bool) -> Tensor:
    """x / rms(x) in fp32, times a weight before the cast back to x's dtype (`weight_in_fp32`) or after it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide or weight_in_fp32:
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps=EPS).to(x.dtype)
    return F.rms_norm(x.to(wide), weight.shape, eps=EPS).to(x.dtype) * weight


def field_product(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    """x + SiLU(norm(x) W1) W2, with the columns of W1 (and of W2 if `normalise2`) scaled to unit length."""
    w1_PCI, w2_PIC = matrices(w_PW, x_PKC.shape[-1])
    w1_PCI = F.normalize(w1_PCI, dim=-2)
    w2_PIC = F.normalize(w2_PIC, dim=-2) if normalise2 else w2_PIC
    return torch.baddbmm(x_PKC, F.silu(torch.bmm(rms_norm(x_PKC, gain_C, True), w1_PCI)), w2_PIC)


def matrices(w_PW: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Each patch's two matrices as views of its weights: W1 [P, C, I] and W2 [P, I, C]."""
    w1, w2 = w_PW.chunk(2, dim=-1)
    return w1.unflatten(-1, (channels, -1)), w2.unflatten(-1, (-1, channels))


def norm_modulate(
    x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor, weight_in_fp32: bool
) -> Tensor:
    """norm(x) (1 + scale) + shift. Each image has its own shift and scale, or one (a batch of 1) serves all images."""
    return torch.addcmul(shift_B1H, rms_norm(x_BNH, weight_H, weight_in_fp32), 1 + scale_B1H)


def norm_rotate(x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_in_fp32: bool) -> Tensor:
    """Normalises each head, then rotates each pair of its values: (a, b) -> (a cos - b sin, a sin + b cos)."""
    cos, sin = cos_ND[:, None], sin_ND[:, None]
    a, b = rms_norm(x_BNhd, weight_d, weight_in_fp32).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_BNhd.dtype)

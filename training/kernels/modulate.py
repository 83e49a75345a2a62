"""Norm and modulation for a GPU, in one pass over x: a program loops over some rows of one image.

Backward recomputes the norm. The gradients of weight, shift and scale are sums over rows, and all three follow from two
sums per image: of g and of g x / rms(x). Each program writes its part of these sums, and the parts are summed
afterwards, always in the same order.

Shapes as in `plain.norm_modulate`; S is the number of programs of an image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.kernels.operators import contiguous_rows, operator
from training.kernels.plain import EPS

_EPS = tl.constexpr(EPS)
_FORWARD_ROWS = 8  # of a program
_BACKWARD_ROWS = 32  # of a program: its parts of the sums are then a few percent of x's own size


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    x_stride_b: tl.tensor,
    x_stride_n: tl.tensor,
    shift_stride_b: tl.tensor,
    scale_stride_b: tl.tensor,
    HIDDEN: tl.constexpr,
    WEIGHT_IN_FP32: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
) -> None:
    image, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    x_ptr += image * x_stride_b
    out_ptr += image * N * HIDDEN
    at_H = tl.arange(0, BH)
    inside = at_H < HIDDEN
    weight_H = tl.load(weight_ptr + at_H, mask=inside, other=0.0).to(tl.float32)
    shift_H = tl.load(shift_ptr + image * shift_stride_b + at_H, mask=inside, other=0.0).to(tl.float32)
    gain_H = 1 + tl.load(scale_ptr + image * scale_stride_b + at_H, mask=inside, other=0.0).to(tl.float32)
    for n in tl.range(first, min(first + ROWS, N), num_stages=3):
        x_H = tl.load(x_ptr + n * x_stride_n + at_H, mask=inside, other=0.0)
        wide_H = x_H.to(tl.float32)
        unit_H = wide_H * tl.rsqrt(tl.sum(wide_H * wide_H, 0) / HIDDEN + _EPS)
        if not WEIGHT_IN_FP32:
            unit_H = unit_H.to(x_H.dtype).to(tl.float32)
        normed_H = (unit_H * weight_H).to(x_H.dtype).to(tl.float32)
        out_H = shift_H + normed_H * gain_H
        tl.store(out_ptr + n * HIDDEN + at_H, out_H.to(x_H.dtype), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    g_ptr: tl.tensor,
    g_x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    N: tl.tensor,
    x_stride_b: tl.tensor,
    x_stride_n: tl.tensor,
    scale_stride_b: tl.tensor,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
) -> None:
    image, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    x_ptr += image * x_stride_b
    g_ptr += image * N * HIDDEN
    g_x_ptr += image * N * HIDDEN
    sums_ptr += (image * tl.num_programs(0) + tl.program_id(0)) * 2 * HIDDEN
    at_H = tl.arange(0, BH)
    inside = at_H < HIDDEN
    weight_H = tl.load(weight_ptr + at_H, mask=inside, other=0.0).to(tl.float32)
    scale_H = tl.load(scale_ptr + image * scale_stride_b + at_H, mask=inside, other=0.0).to(tl.float32)
    gain_H = weight_H * (1 + scale_H)
    sum_g_H = tl.zeros([BH], tl.float32)
    sum_g_unit_H = tl.zeros([BH], tl.float32)
    for n in tl.range(first, min(first + ROWS, N), num_stages=3):
        x_H = tl.load(x_ptr + n * x_stride_n + at_H, mask=inside, other=0.0).to(tl.float32)
        g_H = tl.load(g_ptr + n * HIDDEN + at_H, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x_H * x_H, 0) / HIDDEN + _EPS)
        unit_H = x_H * inverse
        sum_g_H += g_H
        sum_g_unit_H += g_H * unit_H
        g_unit_H = g_H * gain_H
        g_x_H = (g_unit_H - unit_H * (tl.sum(g_unit_H * unit_H, 0) / HIDDEN)) * inverse
        tl.store(g_x_ptr + n * HIDDEN + at_H, g_x_H.to(g_x_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + at_H, sum_g_H, mask=inside)
    tl.store(sums_ptr + HIDDEN + at_H, sum_g_unit_H, mask=inside)


def _options(hidden: int, rows: int) -> dict[str, Any]:
    return {"HIDDEN": hidden, "BH": triton.next_power_of_2(hidden), "ROWS": rows, "enable_fp_fusion": True}


def _forward(x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor, weight_in_fp32: bool) -> Tensor:
    x_BNH, weight_H = contiguous_rows(x_BNH), weight_H.contiguous()
    shift_B1H, scale_B1H = contiguous_rows(shift_B1H), contiguous_rows(scale_B1H)
    images, tokens, hidden = x_BNH.shape
    out_BNH = x_BNH.new_empty(x_BNH.shape)
    strides = *x_BNH.stride()[:2], _image_stride(shift_B1H), _image_stride(scale_B1H)
    options = {**_options(hidden, _FORWARD_ROWS), "WEIGHT_IN_FP32": weight_in_fp32}
    with torch.cuda.device_of(x_BNH):  # Triton launches on the current device, which may be another
        forward_kernel[(triton.cdiv(tokens, _FORWARD_ROWS), images)](
            x_BNH, weight_H, shift_B1H, scale_B1H, out_BNH, tokens, *strides, **options
        )
    return out_BNH


def _backward(
    g_BNH: Tensor, x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor, weight_in_fp32: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for both values of `weight_in_fp32`: the rounding between norm and weight has no gradient of its own."""
    g_BNH, weight_H = g_BNH.contiguous(), weight_H.contiguous()
    x_BNH, scale_B1H = contiguous_rows(x_BNH), contiguous_rows(scale_B1H)
    images, tokens, hidden = x_BNH.shape
    programs = triton.cdiv(tokens, _BACKWARD_ROWS)
    g_x = x_BNH.new_empty(x_BNH.shape)
    sums_BS2H = x_BNH.new_empty(images, programs, 2, hidden, dtype=torch.float32)
    strides = *x_BNH.stride()[:2], _image_stride(scale_B1H)
    options = _options(hidden, _BACKWARD_ROWS)
    with torch.cuda.device_of(x_BNH):
        backward_kernel[(programs, images)](
            x_BNH, weight_H, scale_B1H, g_BNH, g_x, sums_BS2H, tokens, *strides, **options
        )
    g_shift, g_unit = sums_BS2H.sum(1).split(1, dim=1)
    g_scale, g_weight = g_unit * weight_H, (g_unit * (1 + scale_B1H.float())).sum((0, 1))
    return g_x, g_weight.to(weight_H.dtype), _for_images(g_shift, shift_B1H), _for_images(g_scale, scale_B1H)


norm_modulate = operator("norm_modulate", _forward, _backward, gradients=4)


def _image_stride(x_B1H: Tensor) -> int:
    return 0 if len(x_B1H) == 1 else x_B1H.stride(0)


def _for_images(g_B1H: Tensor, like_B1H: Tensor) -> Tensor:
    """The gradient of a shift or scale: summed over the images where one served them all."""
    if len(like_B1H) == 1:
        g_B1H = g_B1H.sum(0, keepdim=True)
    return g_B1H.to(like_B1H.dtype).contiguous()

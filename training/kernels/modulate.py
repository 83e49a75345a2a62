"""Norm and modulation for a GPU, in one pass over x: a program walks over some rows of one image.

Backward works the norm out again. The gradients of weight, shift and scale are sums over rows; all three follow from
two sums an image, of g and of g x / rms(x). Each program writes its part of them, and the parts are summed afterwards,
always in the same order.

Shapes as in the twin, `plain.norm_modulate`; S programs an image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.kernels.plain import EPS

_EPS = tl.constexpr(EPS)
_PROGRAM_ROWS = {
    "forward": 8,
    "backward": 32,
}  # of a program: their parts of the sums are then a few percent of x itself


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


def constants(hidden: int) -> dict[str, int]:
    return {"HIDDEN": hidden, "BH": triton.next_power_of_2(hidden)}


@torch.library.custom_op("pixnerd::norm_modulate", mutates_args=())
def norm_modulate(
    x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor, weight_in_fp32: bool
) -> Tensor:
    x_BNH, shift_B1H, scale_B1H = _whole_rows(x_BNH), _whole_rows(shift_B1H), _whole_rows(scale_B1H)
    images, tokens, hidden = x_BNH.shape
    out_BNH = x_BNH.new_empty(x_BNH.shape)
    with torch.cuda.device_of(x_BNH):  # Triton launches on the current device, which may be another
        forward_kernel[(triton.cdiv(tokens, _PROGRAM_ROWS["forward"]), images)](
            x_BNH,
            weight_H.contiguous(),
            shift_B1H,
            scale_B1H,
            out_BNH,
            tokens,
            x_BNH.stride(0),
            x_BNH.stride(1),
            _image_stride(shift_B1H),
            _image_stride(scale_B1H),
            **constants(hidden),
            WEIGHT_IN_FP32=weight_in_fp32,
            ROWS=_PROGRAM_ROWS["forward"],
            enable_fp_fusion=True,
        )
    return out_BNH


@torch.library.custom_op("pixnerd::norm_modulate_backward", mutates_args=())
def _backward(
    g_BNH: Tensor, x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g_BNH, x_BNH, scale_B1H = g_BNH.contiguous(), _whole_rows(x_BNH), _whole_rows(scale_B1H)
    images, tokens, hidden = x_BNH.shape
    programs = triton.cdiv(tokens, _PROGRAM_ROWS["backward"])
    g_x = x_BNH.new_empty(x_BNH.shape)
    sums_BS2H = x_BNH.new_empty(images, programs, 2, hidden, dtype=torch.float32)
    with torch.cuda.device_of(x_BNH):
        backward_kernel[(programs, images)](
            x_BNH,
            weight_H.contiguous(),
            scale_B1H,
            g_BNH,
            g_x,
            sums_BS2H,
            tokens,
            x_BNH.stride(0),
            x_BNH.stride(1),
            _image_stride(scale_B1H),
            **constants(hidden),
            ROWS=_PROGRAM_ROWS["backward"],
            enable_fp_fusion=True,
        )
    g_shift, g_unit = sums_BS2H.sum(1).split(1, dim=1)
    g_scale, g_weight = g_unit * weight_H, (g_unit * (1 + scale_B1H.float())).sum((0, 1))
    return g_x, g_weight.to(weight_H.dtype), _for_images(g_shift, shift_B1H), _for_images(g_scale, scale_B1H)


@norm_modulate.register_fake
def _(x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor, weight_in_fp32: bool) -> Tensor:
    return x_BNH.new_empty(x_BNH.shape)


@_backward.register_fake
def _(
    g_BNH: Tensor, x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x_BNH.new_empty(x_BNH.shape),
        weight_H.new_empty(weight_H.shape),
        shift_B1H.new_empty(shift_B1H.shape),
        scale_B1H.new_empty(scale_B1H.shape),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gradients(ctx: Any, g_BNH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    return *_backward(g_BNH, *ctx.saved_tensors), None


norm_modulate.register_autograd(_gradients, setup_context=_save)


def _whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _image_stride(x_B1H: Tensor) -> int:
    return 0 if len(x_B1H) == 1 else x_B1H.stride(0)


def _for_images(g_B1H: Tensor, like_B1H: Tensor) -> Tensor:
    """What was one for all images gets the sum over them."""
    if len(like_B1H) == 1:
        g_B1H = g_B1H.sum(0, keepdim=True)
    return g_B1H.to(like_B1H.dtype).contiguous()

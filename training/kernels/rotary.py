"""QK-norm and rotary positions for a GPU, in one pass: a program handles some heads of some tokens of one image.

x is read in place, as a slice of the fused projection; the result is contiguous. Backward rotates by the opposite angle
and recomputes the norm. Each program writes its part of the weight's gradient, and the parts are summed afterwards,
always in the same order.

Shapes as in `plain.norm_rotate`; R is the number of a program's rows, and a row is one head of one token.
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


@triton.jit
def _rows(
    N: tl.tensor, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The index, token and head of each row; the offsets within a head, and in the cos and sin tables, with masks."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = row_R // HEADS, row_R % HEADS
    at_d, pair_D = tl.arange(0, BD), tl.arange(0, BD // 2)
    table_RD = token_R[:, None] * (HEAD_DIM // 2) + pair_D[None, :]
    is_token_R1 = (token_R < N)[:, None]
    return (
        row_R[:, None],
        token_R[:, None],
        head_R[:, None],
        at_d[None, :],
        is_token_R1 & (at_d < HEAD_DIM)[None, :],
        table_RD,
        is_token_R1 & (pair_D < HEAD_DIM // 2)[None, :],
    )


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    x_stride_b: tl.tensor,
    x_stride_n: tl.tensor,
    x_stride_h: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WEIGHT_IN_FP32: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    row, token, head, at_d, inside, table, in_table = _rows(N, HEADS, HEAD_DIM, ROWS, BD)
    x_at = image * x_stride_b + token * x_stride_n + head * x_stride_h + at_d
    x_Rd = tl.load(x_ptr + x_at, mask=inside, other=0.0)
    weight_d = tl.load(weight_ptr + at_d, mask=at_d < HEAD_DIM, other=0.0).to(tl.float32)
    cos_RD = tl.load(cos_ptr + table, mask=in_table, other=0.0)
    sin_RD = tl.load(sin_ptr + table, mask=in_table, other=0.0)
    wide_Rd = x_Rd.to(tl.float32)
    unit_Rd = wide_Rd * tl.rsqrt(tl.sum(wide_Rd * wide_Rd, 1) / HEAD_DIM + _EPS)[:, None]
    if not WEIGHT_IN_FP32:
        unit_Rd = unit_Rd.to(x_Rd.dtype).to(tl.float32)
    normed_Rd = (unit_Rd * weight_d).to(x_Rd.dtype).to(tl.float32)
    a_RD, b_RD = tl.split(tl.reshape(normed_Rd, (ROWS, BD // 2, 2)))
    turned = tl.join(a_RD * cos_RD - b_RD * sin_RD, a_RD * sin_RD + b_RD * cos_RD)
    out_at = image * N * HEADS * HEAD_DIM + row * HEAD_DIM + at_d
    tl.store(out_ptr + out_at, tl.reshape(turned, (ROWS, BD)).to(x_Rd.dtype), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    g_ptr: tl.tensor,
    g_x_ptr: tl.tensor,
    g_weight_ptr: tl.tensor,
    N: tl.tensor,
    x_stride_b: tl.tensor,
    x_stride_n: tl.tensor,
    x_stride_h: tl.tensor,
    g_stride_b: tl.tensor,
    g_stride_n: tl.tensor,
    g_stride_h: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    row, token, head, at_d, inside, table, in_table = _rows(N, HEADS, HEAD_DIM, ROWS, BD)
    x_at = image * x_stride_b + token * x_stride_n + head * x_stride_h + at_d
    g_at = image * g_stride_b + token * g_stride_n + head * g_stride_h + at_d
    x_Rd = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    g_Rd = tl.load(g_ptr + g_at, mask=inside, other=0.0).to(tl.float32)
    weight_d = tl.load(weight_ptr + at_d, mask=at_d < HEAD_DIM, other=0.0).to(tl.float32)
    cos_RD = tl.load(cos_ptr + table, mask=in_table, other=0.0)
    sin_RD = tl.load(sin_ptr + table, mask=in_table, other=0.0)
    g_a_RD, g_b_RD = tl.split(tl.reshape(g_Rd, (ROWS, BD // 2, 2)))
    turned = tl.join(g_a_RD * cos_RD + g_b_RD * sin_RD, g_b_RD * cos_RD - g_a_RD * sin_RD)
    g_normed_Rd = tl.reshape(turned, (ROWS, BD))
    inverse_R1 = tl.rsqrt(tl.sum(x_Rd * x_Rd, 1) / HEAD_DIM + _EPS)[:, None]
    unit_Rd = x_Rd * inverse_R1
    g_unit_Rd = g_normed_Rd * weight_d
    along_R1 = tl.sum(g_unit_Rd * unit_Rd, 1)[:, None] / HEAD_DIM
    g_x_Rd = (g_unit_Rd - unit_Rd * along_R1) * inverse_R1
    g_x_at = image * N * HEADS * HEAD_DIM + row * HEAD_DIM + at_d
    tl.store(g_x_ptr + g_x_at, g_x_Rd.to(g_x_ptr.dtype.element_ty), mask=inside)
    program = image * tl.num_programs(0) + tl.program_id(0)
    value_d = tl.arange(0, BD)
    g_weight_d = tl.sum(g_normed_Rd * unit_Rd, 0)
    tl.store(g_weight_ptr + program * HEAD_DIM + value_d, g_weight_d, mask=value_d < HEAD_DIM)


def _options(heads: int, head_dim: int) -> dict[str, Any]:
    block = triton.next_power_of_2(head_dim)
    rows = max(1, 2**12 // block)
    return {"HEADS": heads, "HEAD_DIM": head_dim, "BD": block, "ROWS": rows, "enable_fp_fusion": True}


def _forward(x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_in_fp32: bool) -> Tensor:
    x_BNhd, weight_d = contiguous_rows(x_BNhd), weight_d.contiguous()
    cos_ND, sin_ND = cos_ND.contiguous(), sin_ND.contiguous()
    images, tokens, heads, head_dim = x_BNhd.shape
    options = {**_options(heads, head_dim), "WEIGHT_IN_FP32": weight_in_fp32}
    out_BNhd = x_BNhd.new_empty(x_BNhd.shape)
    with torch.cuda.device_of(x_BNhd):  # Triton launches on the current device, which may be another
        forward_kernel[(triton.cdiv(tokens * heads, options["ROWS"]), images)](
            x_BNhd, weight_d, cos_ND, sin_ND, out_BNhd, tokens, *x_BNhd.stride()[:3], **options
        )
    return out_BNhd


def _backward(
    g_BNhd: Tensor, x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The same for both values of `weight_in_fp32`: the rounding between norm and weight has no gradient of its own."""
    g_BNhd, x_BNhd, weight_d = contiguous_rows(g_BNhd), contiguous_rows(x_BNhd), weight_d.contiguous()
    cos_ND, sin_ND = cos_ND.contiguous(), sin_ND.contiguous()
    images, tokens, heads, head_dim = x_BNhd.shape
    options = _options(heads, head_dim)
    programs = triton.cdiv(tokens * heads, options["ROWS"])
    g_x = x_BNhd.new_empty(x_BNhd.shape)
    g_weight = weight_d.new_empty(images * programs, head_dim, dtype=torch.float32)
    strides = *x_BNhd.stride()[:3], *g_BNhd.stride()[:3]
    with torch.cuda.device_of(x_BNhd):
        backward_kernel[(programs, images)](
            x_BNhd, weight_d, cos_ND, sin_ND, g_BNhd, g_x, g_weight, tokens, *strides, **options
        )
    return g_x, g_weight.sum(0).to(weight_d.dtype)


norm_rotate = operator("norm_rotate", _forward, _backward, gradients=2)

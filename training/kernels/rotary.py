"""QK-norm and rotary positions for a GPU, in one pass: a program handles some heads of some tokens of one image.

x is read where it lies, a slice of the fused projection; the result is contiguous. Backward turns the other way round
and works the norm out again; each program writes its part of the weight's gradient, and the parts are summed
afterwards, always in the same order.

Shapes as in the twin, `plain.norm_rotate`; R rows of a program, each one head of one token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.kernels.plain import EPS

_EPS = tl.constexpr(EPS)


@triton.jit
def _rows(
    N: tl.tensor, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Token and head of each row, the values of a head, where a row's cos and sin lie; and what of it is there."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = row_R // HEADS, row_R % HEADS
    at_d, pair_D = tl.arange(0, BD), tl.arange(0, BD // 2)
    table_RD = token_R[:, None] * (HEAD_DIM // 2) + pair_D[None, :]
    there_R1 = (token_R < N)[:, None]
    return (
        row_R[:, None],
        token_R[:, None],
        head_R[:, None],
        at_d[None, :],
        there_R1 & (at_d < HEAD_DIM)[None, :],
        table_RD,
        there_R1 & (pair_D < HEAD_DIM // 2)[None, :],
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


def constants(heads: int, head_dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(head_dim)
    return {"HEADS": heads, "HEAD_DIM": head_dim, "BD": block, "ROWS": max(1, 2**12 // block)}


@torch.library.custom_op("pixnerd::norm_rotate", mutates_args=())
def norm_rotate(x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_in_fp32: bool) -> Tensor:
    x_BNhd = _whole_heads(x_BNhd)
    images, tokens, heads, head_dim = x_BNhd.shape
    sizes = constants(heads, head_dim)
    out_BNhd = x_BNhd.new_empty(x_BNhd.shape)
    with torch.cuda.device_of(x_BNhd):  # Triton launches on the current device, which may be another
        forward_kernel[(triton.cdiv(tokens * heads, sizes["ROWS"]), images)](
            x_BNhd,
            weight_d.contiguous(),
            cos_ND.contiguous(),
            sin_ND.contiguous(),
            out_BNhd,
            tokens,
            *x_BNhd.stride()[:3],
            **sizes,
            WEIGHT_IN_FP32=weight_in_fp32,
            enable_fp_fusion=True,
        )
    return out_BNhd


@torch.library.custom_op("pixnerd::norm_rotate_backward", mutates_args=())
def _backward(
    g_BNhd: Tensor, x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor
) -> tuple[Tensor, Tensor]:
    g_BNhd, x_BNhd = _whole_heads(g_BNhd), _whole_heads(x_BNhd)
    images, tokens, heads, head_dim = x_BNhd.shape
    sizes = constants(heads, head_dim)
    programs = triton.cdiv(tokens * heads, sizes["ROWS"])
    g_x = x_BNhd.new_empty(x_BNhd.shape)
    g_weight = weight_d.new_empty(images * programs, head_dim, dtype=torch.float32)
    with torch.cuda.device_of(x_BNhd):
        backward_kernel[(programs, images)](
            x_BNhd,
            weight_d.contiguous(),
            cos_ND.contiguous(),
            sin_ND.contiguous(),
            g_BNhd,
            g_x,
            g_weight,
            tokens,
            *x_BNhd.stride()[:3],
            *g_BNhd.stride()[:3],
            **sizes,
            enable_fp_fusion=True,
        )
    return g_x, g_weight.sum(0).to(weight_d.dtype)


@norm_rotate.register_fake
def _(x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_in_fp32: bool) -> Tensor:
    return x_BNhd.new_empty(x_BNhd.shape)


@_backward.register_fake
def _(g_BNhd: Tensor, x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> tuple[Tensor, Tensor]:
    return x_BNhd.new_empty(x_BNhd.shape), weight_d.new_empty(weight_d.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gradients(ctx: Any, g_BNhd: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *_backward(g_BNhd, *ctx.saved_tensors), None, None, None


norm_rotate.register_autograd(_gradients, setup_context=_save)


def _whole_heads(x_BNhd: Tensor) -> Tensor:
    return x_BNhd if x_BNhd.stride(-1) == 1 else x_BNhd.contiguous()

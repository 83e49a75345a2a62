"""The field's product for a GPU: a program holds one patch's weights and loops over that patch's pixels.

Intermediate values never reach memory and are not saved: backward recomputes them. Each sum over a patch is taken by
one program in a fixed order, so results repeat bit for bit. The gain is shared by all patches, so each program writes
its part of the gain's gradient, and the parts are summed afterwards.

Shapes as in `plain.field_product`. BK, BC and BI are the block sizes, powers of two: the pixels that a program handles
at once, all channels, and the inner values that it handles at once. An I larger than BI is cut into chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from training.kernels.operators import operator
from training.kernels.plain import EPS, matrices

_EPS = tl.constexpr(EPS)


@triton.jit
def _tanh(a: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    if FAST:
        # One instruction, with an error below bf16's rounding. A sigmoid takes an exponential and a division, two on
        # the same slow unit, which would then be as busy as the memory.
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [a], tl.float32, is_pure=True, pack=1)
    return 2 * tl.sigmoid(2 * a) - 1


@triton.jit
def _offsets(
    first: tl.tensor, CHANNELS: tl.constexpr, INNER: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Offsets and masks of one chunk: the columns of W1 from `first` on, and the rows of W2 that multiply them."""
    c, i = tl.arange(0, BC), first + tl.arange(0, BI)
    at1_CI = c[:, None] * INNER + i[None, :]
    at2_IC = CHANNELS * INNER + i[:, None] * CHANNELS + c[None, :]
    return (
        at1_CI,
        (c[:, None] < CHANNELS) & (i[None, :] < INNER),
        at2_IC,
        (i[:, None] < INNER) & (c[None, :] < CHANNELS),
    )


@triton.jit
def _inverse(w: tl.tensor) -> tl.tensor:
    """One over the L2 norm of each column, 1e12 at most."""
    wide = w.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(wide * wide, 0), 1e-24))


@triton.jit
def _inverse_rms(x_KC: tl.tensor, CHANNELS: tl.constexpr) -> tl.tensor:
    wide = x_KC.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) / CHANNELS + _EPS)[:, None]


@triton.jit
def _unit_weights(
    w_ptr: tl.tensor,
    gain_C: tl.tensor,
    first: tl.tensor,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    NORMALISE2: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A chunk of W1 and W2 with columns of unit length. The gain goes into W1, which is smaller than x."""
    at1_CI, inside1, at2_IC, inside2 = _offsets(first, CHANNELS, INNER, BC, BI)
    w1_CI = tl.load(w_ptr + at1_CI, mask=inside1, other=0.0)
    w1_CI = (w1_CI.to(tl.float32) * _inverse(w1_CI)[None, :] * gain_C[:, None]).to(w1_CI.dtype)
    w2_IC = tl.load(w_ptr + at2_IC, mask=inside2, other=0.0)
    if NORMALISE2:
        w2_IC = (w2_IC.to(tl.float32) * _inverse(w2_IC)[None, :]).to(w2_IC.dtype)
    return w1_CI, w2_IC


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    w_ptr: tl.tensor,
    out_ptr: tl.tensor,
    K: tl.tensor,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    NORMALISE2: tl.constexpr,
    FAST: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
) -> None:
    patch = tl.program_id(0).to(tl.int64)
    x_ptr += patch * K * CHANNELS
    out_ptr += patch * K * CHANNELS
    w_ptr += patch * 2 * CHANNELS * INNER
    c = tl.arange(0, BC)
    half_gain_C = 0.5 * tl.load(gain_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    if INNER <= BI:
        w1_CI, w2_IC = _unit_weights(w_ptr, half_gain_C, 0, CHANNELS, INNER, NORMALISE2, BC, BI)
    for start in tl.range(0, K, BK, num_stages=2):
        k = start + tl.arange(0, BK)
        at_KC, inside = k[:, None] * CHANNELS + c[None, :], (k[:, None] < K) & (c[None, :] < CHANNELS)
        x_KC = tl.load(x_ptr + at_KC, mask=inside, other=0.0)
        unit_KC = (x_KC.to(tl.float32) * _inverse_rms(x_KC, CHANNELS)).to(x_KC.dtype)
        y_KC = tl.zeros([BK, BC], tl.float32)
        for first in tl.range(0, INNER, BI, num_stages=1):
            if INNER > BI:
                w1_CI, w2_IC = _unit_weights(w_ptr, half_gain_C, first, CHANNELS, INNER, NORMALISE2, BC, BI)
            # With a = 2 half: SiLU(a) = half (1 + tanh(half)).
            half_KI = tl.dot(unit_KC, w1_CI, input_precision="ieee")
            h_KI = (half_KI + half_KI * _tanh(half_KI, FAST)).to(x_KC.dtype)
            y_KC = tl.dot(h_KI, w2_IC, acc=y_KC, input_precision="ieee")
        tl.store(out_ptr + at_KC, (x_KC.to(tl.float32) + y_KC).to(x_KC.dtype), mask=inside)


@triton.jit
def backward_kernel(
    x_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    w_ptr: tl.tensor,
    g_ptr: tl.tensor,
    g_x_ptr: tl.tensor,
    g_gain_ptr: tl.tensor,
    g_w_ptr: tl.tensor,
    K: tl.tensor,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    NORMALISE2: tl.constexpr,
    FAST: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
) -> None:
    """One patch and one chunk: the chunk's part of g_w, and its contributions to the patch's g_x and to g_gain.

    Inner values are laid out as [I, K], so that one product's result is the next one's left operand, in registers. W is
    multiplied as it lies in memory; its columns' norms, and the gain, are applied to the other operand.
    """
    patch, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = chunk * tl.num_programs(0) + patch
    x_ptr += patch * K * CHANNELS
    g_ptr += patch * K * CHANNELS
    g_x_ptr += part * K * CHANNELS
    w_ptr += patch * 2 * CHANNELS * INNER
    g_w_ptr += patch * 2 * CHANNELS * INNER
    c = tl.arange(0, BC)
    gain_C = tl.load(gain_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    at1_CI, inside1, at2_IC, inside2 = _offsets(chunk * BI, CHANNELS, INNER, BC, BI)
    w1_CI = tl.load(w_ptr + at1_CI, mask=inside1, other=0.0)
    w2_IC = tl.load(w_ptr + at2_IC, mask=inside2, other=0.0)
    half_inverse1_I1 = 0.5 * _inverse(w1_CI)[:, None]
    if NORMALISE2:
        inverse2_C = _inverse(w2_IC)
    g_gain_KC = tl.zeros([BK, BC], tl.float32)
    g_w1_IC = tl.zeros([BI, BC], tl.float32)
    g_w2_IC = tl.zeros([BI, BC], tl.float32)
    for start in tl.range(0, K, BK, num_stages=2):
        k = start + tl.arange(0, BK)
        at_KC, inside = k[:, None] * CHANNELS + c[None, :], (k[:, None] < K) & (c[None, :] < CHANNELS)
        x_KC = tl.load(x_ptr + at_KC, mask=inside, other=0.0)
        g_KC = tl.load(g_ptr + at_KC, mask=inside, other=0.0)
        inverse_K1 = _inverse_rms(x_KC, CHANNELS)
        normed_KC = (x_KC.to(tl.float32) * inverse_K1 * gain_C[None, :]).to(x_KC.dtype)
        g_y_KC = g_KC
        if NORMALISE2:
            g_y_KC = (g_KC.to(tl.float32) * inverse2_C[None, :]).to(x_KC.dtype)

        # With a = 2 half and t = tanh(half): h = SiLU(a) = half (1 + t), and SiLU'(a) = (1 + h + t (1 - h)) / 2.
        half_IK = tl.dot(tl.trans(w1_CI), tl.trans(normed_KC), input_precision="ieee")
        g_h_IK = tl.dot(w2_IC, tl.trans(g_y_KC), input_precision="ieee")
        half_IK *= half_inverse1_I1
        t_IK = _tanh(half_IK, FAST)
        h_IK = half_IK + half_IK * t_IK
        g_a_IK = (g_h_IK * half_inverse1_I1 * (1 + h_IK + t_IK * (1 - h_IK))).to(x_KC.dtype)
        g_w2_IC = tl.dot(h_IK.to(x_KC.dtype), g_y_KC, acc=g_w2_IC, input_precision="ieee")
        g_w1_IC = tl.dot(g_a_IK, normed_KC, acc=g_w1_IC, input_precision="ieee")

        g_normed_KC = tl.trans(tl.dot(w1_CI, g_a_IK, input_precision="ieee"))
        unit_KC = x_KC.to(tl.float32) * inverse_K1
        g_gain_KC += g_normed_KC * unit_KC
        g_unit_KC = g_normed_KC * gain_C[None, :]
        along_K1 = tl.sum(g_unit_KC * unit_KC, 1)[:, None] / CHANNELS
        g_x_KC = (g_unit_KC - unit_KC * along_K1) * inverse_K1
        if chunk == 0:
            g_x_KC += g_KC.to(tl.float32)
        tl.store(g_x_ptr + at_KC, g_x_KC.to(x_KC.dtype), mask=inside)
    tl.store(g_gain_ptr + part * CHANNELS + c, tl.sum(g_gain_KC, 0), mask=c < CHANNELS)

    # The result does not depend on a column's length, so the gradient has no component along the column.
    w1_IC = tl.trans(tl.load(w_ptr + at1_CI, mask=inside1, other=0.0)).to(tl.float32)
    along1_I1 = tl.sum(g_w1_IC * w1_IC, 1)[:, None] * (4 * half_inverse1_I1 * half_inverse1_I1)
    g_w1_IC = (g_w1_IC - w1_IC * along1_I1).to(w1_CI.dtype)
    tl.store(g_w_ptr + at1_CI, tl.trans(g_w1_IC), mask=inside1)
    if NORMALISE2:
        w2_IC = tl.load(w_ptr + at2_IC, mask=inside2, other=0.0)
        along2_C = tl.sum(g_w2_IC * w2_IC.to(tl.float32), 0) * (inverse2_C * inverse2_C)
        g_w2_IC -= w2_IC.to(tl.float32) * along2_C[None, :]
    tl.store(g_w_ptr + at2_IC, g_w2_IC.to(w1_CI.dtype), mask=inside2)


def _blocks(channels: int, inner: int) -> tuple[int, int]:
    """BC and BI."""
    block_c = max(16, triton.next_power_of_2(channels))
    return block_c, min(max(16, triton.next_power_of_2(inner)), 2**13 // block_c)


def _options(x_PKC: Tensor, w_PW: Tensor, normalise2: bool, *, backward: bool) -> dict[str, Any]:
    """A kernel's constants, and how many warps and registers a program gets.

    They let 2 (backward) or 4 programs fit a multiprocessor, so that one's loads overlap with another's work.
    """
    _, pixels, channels = x_PKC.shape
    inner = w_PW.shape[1] // (2 * channels)
    wide = x_PKC.dtype == torch.float32
    block_c, block_i = _blocks(channels, inner)
    block_k = 16 if wide else 32 if backward else 64
    large = block_c * block_i == 2**13
    return {
        "CHANNELS": channels,
        "INNER": inner,
        "NORMALISE2": normalise2,
        "FAST": _fast(x_PKC),
        "BK": min(block_k, max(16, triton.next_power_of_2(pixels))),
        "BC": block_c,
        "BI": block_i,
        "num_warps": 8 if large and (backward or wide) else 4,
        "maxnreg": 128 if large and inner <= block_i and not wide else None,
        "enable_fp_fusion": True,
    }


def _forward(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    x_PKC, gain_C, w_PW = x_PKC.contiguous(), gain_C.contiguous(), w_PW.contiguous()
    patches, pixels, _ = x_PKC.shape
    out_PKC = torch.empty_like(x_PKC)
    options = _options(x_PKC, w_PW, normalise2, backward=False)
    with torch.cuda.device_of(x_PKC):  # Triton launches on the current device, which may be another
        forward_kernel[(patches,)](x_PKC, gain_C, w_PW, out_PKC, pixels, **options)
    return out_PKC


def _backward(
    g_PKC: Tensor, x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g_PKC, x_PKC, gain_C, w_PW = g_PKC.contiguous(), x_PKC.contiguous(), gain_C.contiguous(), w_PW.contiguous()
    patches, pixels, channels = x_PKC.shape
    options = _options(x_PKC, w_PW, normalise2, backward=True)
    chunks = triton.cdiv(options["INNER"], options["BI"])
    g_x = x_PKC.new_empty(chunks, patches, pixels, channels)
    g_gain = x_PKC.new_empty(chunks * patches, channels, dtype=torch.float32)
    g_w = torch.empty_like(w_PW)
    with torch.cuda.device_of(x_PKC):
        backward_kernel[(patches, chunks)](x_PKC, gain_C, w_PW, g_PKC, g_x, g_gain, g_w, pixels, **options)
    return g_x.sum(0) if chunks > 1 else g_x[0], g_gain.sum(0).to(gain_C.dtype), g_w


_field_product = operator("field_product", _forward, _backward, gradients=3)


def _fast(x: Tensor) -> bool:
    """Whether to use the tanh instruction. Triton's interpreter, whose tensors are on the CPU, cannot run assembly."""
    return x.is_cuda and x.dtype == torch.bfloat16


def field_product(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    channels = x_PKC.shape[-1]
    if normalise2:
        w1_PCI, w2_PIC = matrices(w_PW, channels)
        inner = w1_PCI.shape[-1]
        if inner > _blocks(channels, inner)[1]:
            # A column of W2 extends over all chunks, and a program sees one of them.
            w_PW = torch.cat([w1_PCI.flatten(1), F.normalize(w2_PIC, dim=-2).flatten(1)], dim=1)
            normalise2 = False
    return _field_product(x_PKC, gain_C, w_PW, normalise2)

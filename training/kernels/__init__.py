"""The three operations that a compiler leaves slow: Triton kernels for a GPU, ordinary PyTorch for everything else.

    field_product   x + SiLU(norm(x) W1) W2 with each patch's own W1 and W2
    norm_modulate   norm(x) (1 + scale) + shift
    norm_rotate     rotary positions of norm(q) and norm(k)

CUDA tensors that share one dtype (fp32 or bf16) go to the kernel, all others to the function of the same name in
`plain`. `field_product` has a CPU version as well, in `tiled`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from training.kernels import plain, tiled

__all__ = ["field_product", "norm_modulate", "norm_rotate"]

_TRITON = importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
_TYPES = (torch.float32, torch.bfloat16)  # those that the kernels are tested in; fp16's range is too small to train in


def field_product(x_PKC: Tensor, gain_C: Tensor, w_PW: Tensor, normalise2: bool) -> Tensor:
    if x_PKC.is_cpu and x_PKC.dtype in (torch.float32, torch.float64):
        return tiled.field_product(x_PKC, gain_C, w_PW, normalise2)
    if not _for_kernel(x_PKC, gain_C, w_PW):
        return plain.field_product(x_PKC, gain_C, w_PW, normalise2)
    from training.kernels import field

    return field.field_product(x_PKC, gain_C, w_PW, normalise2)


def norm_modulate(
    x_BNH: Tensor, weight_H: Tensor, shift_B1H: Tensor, scale_B1H: Tensor, weight_in_fp32: bool
) -> Tensor:
    # torch.compile fuses the plain version by itself, and with the operations around it as well.
    if torch.compiler.is_compiling() or not _for_kernel(x_BNH, weight_H, shift_B1H, scale_B1H):
        return plain.norm_modulate(x_BNH, weight_H, shift_B1H, scale_B1H, weight_in_fp32)
    from training.kernels import modulate

    return modulate.norm_modulate(x_BNH, weight_H, shift_B1H, scale_B1H, weight_in_fp32)


def norm_rotate(x_BNhd: Tensor, weight_d: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_in_fp32: bool) -> Tensor:
    if torch.compiler.is_compiling() or not _for_kernel(x_BNhd, weight_d):
        return plain.norm_rotate(x_BNhd, weight_d, cos_ND, sin_ND, weight_in_fp32)
    from training.kernels import rotary

    return rotary.norm_rotate(x_BNhd, weight_d, cos_ND, sin_ND, weight_in_fp32)


def _for_kernel(x: Tensor, *others: Tensor) -> bool:
    one_type = x.dtype in _TYPES and all(other.dtype == x.dtype for other in others)
    return _TRITON and x.is_cuda and one_type and x.numel() > 0  # a launch of no programs is an error

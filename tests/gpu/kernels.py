"""The kernels against their twins on this device: results and gradients, at the sizes of XXL/16 and at odd ones.

The truth is the twin in fp64. A kernel may be off it by half as much again as the twin in the kernel's own type, and a
few roundings of that type more. On a CPU the same calls end at the twins or the tiled field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.gpu.parts import OPERATIONS
from tests.gpu.report import Options, Report
from training import kernels
from training.kernels import plain

TYPES = {"fp32": (torch.float32, 2e-6), "bf16": (torch.bfloat16, 2**-7)}  # and what is forgiven
Function = Callable[..., Tensor]


class Case(NamedTuple):
    kernel: Function
    twin: Function
    leaves: list[Tensor]  # fp32; all of them get gradients


class Errors(NamedTuple):
    """The largest errors, as a share of the largest true value."""

    forward: float
    backward: float

    def __str__(self) -> str:
        return f"{self.forward:.1e}, {self.backward:.1e}"


def field(patches: int, pixels: int, channels: int, ratio: int, normalise2: bool) -> Case:
    leaves = [_random(patches, pixels, channels), _gain(channels), _random(patches, 2 * ratio * channels**2)]
    return _case("field_product", leaves, normalise2)


def modulate(images: int, tokens: int, hidden: int, shared: bool) -> Case:
    own = 1 if shared else images
    return _case("norm_modulate", [_random(images, tokens, hidden), _gain(hidden), *_two(own, 1, hidden)], True)


def rotate(images: int, tokens: int, heads: int, head_dim: int) -> Case:
    angles_ND = _random(tokens, head_dim // 2)
    leaves = [_random(images, tokens, heads, head_dim), _gain(head_dim)]
    return _case("norm_rotate", leaves, angles_ND.cos(), angles_ND.sin(), True)


LARGE: dict[str, list[Callable[[], Case]]] = {
    "field": [
        lambda: field(256, 256, 64, 2, True),  # an image of 256 px
        lambda: field(48, 256, 64, 2, False),
        lambda: field(8, 32 * 32, 64, 2, True),  # larger patches, as at a larger size than the trained one
        lambda: field(5, 100, 72, 2, True),  # the inner values in chunks
        lambda: field(3, 7, 16, 1, True),
    ],
    "norm and modulation": [
        lambda: modulate(4, 1024, 1536, False),  # 512 px
        lambda: modulate(2, 128, 1536, True),
        lambda: modulate(3, 7, 36, False),
    ],
    "norm and rotary": [lambda: rotate(4, 1024, 24, 64), lambda: rotate(3, 7, 5, 72)],
}
TINY: dict[str, list[Callable[[], Case]]] = {
    "field": [lambda: field(3, 20, 16, 2, True)],
    "norm and modulation": [lambda: modulate(2, 5, 36, False)],
    "norm and rotary": [lambda: rotate(2, 5, 2, 16)],
}


def check(report: Report, options: Options) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # the twin's fp32 must be fp32
    for name in OPERATIONS:
        for dtype in TYPES:
            _check(report, options, name, dtype)


def _check(report: Report, options: Options, name: str, dtype: str) -> None:
    """All cases of a kernel in a type: the worst of each, and whether one of them passes its own bound."""
    kind, forgiven = TYPES[dtype]
    ours, theirs, holds = [], [], True
    for make in (TINY if options.tiny else LARGE)[name]:
        torch.manual_seed(0)
        case = make()
        leaves = [leaf.to(options.device, kind) for leaf in case.leaves]
        # On a GPU a call that ends at the twin would compare it with itself.
        assert not options.gpu or kernels._for_kernel(*leaves), f"{name} in {dtype} does not reach its kernel"
        truth = results(case.twin, leaves, torch.float64)
        ours.append(errors(results(case.kernel, leaves, kind), truth))
        theirs.append(errors(results(case.twin, leaves, kind), truth))
        holds &= all(one <= 1.5 * other + forgiven for one, other in zip(ours[-1], theirs[-1], strict=True))
    worst, twins = _worst(ours), _worst(theirs)
    report.figure(
        f"{name}, {dtype}: error forward, backward",
        f"{'' if holds else 'FAILS: '}{worst} (twin {twins})",
        f"bound: 1.5 times the twin's + {forgiven:.0e}, in each case",
        failed=not holds,
    )


def _worst(found: list[Errors]) -> Errors:
    return Errors(max(one.forward for one in found), max(one.backward for one in found))


def results(function: Function, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What it computes, and the gradient of every leaf, for one random gradient of the result."""
    tensors = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    out = function(*tensors)
    g = _random(*out.shape, seed=1).to(leaves[0].device, leaves[0].dtype).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, g)]


def errors(found: list[Tensor], truth: list[Tensor]) -> Errors:
    """A value that is not finite is an infinite error, whatever `max` makes of it."""

    def error(one: Tensor, true: Tensor) -> float:
        share = float((one.double() - true).abs().max() / true.abs().max())
        return share if bool(one.isfinite().all()) else float("inf")

    forward, *backward = (error(one, true) for one, true in zip(found, truth, strict=True))
    return Errors(forward, max(backward))


def _case(name: str, leaves: list[Tensor], *rest: object) -> Case:
    def bound(function: Function) -> Function:
        def called(*tensors: Tensor) -> Tensor:
            device = tensors[0].device
            return function(*tensors, *(part.to(device) if isinstance(part, Tensor) else part for part in rest))

        return called

    return Case(bound(getattr(kernels, name)), bound(getattr(plain, name)), leaves)


def _random(*shape: int, seed: int | None = None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def _gain(size: int) -> Tensor:
    return torch.rand(size) + 0.5


def _two(*shape: int) -> tuple[Tensor, Tensor]:
    return _random(*shape), _random(*shape)

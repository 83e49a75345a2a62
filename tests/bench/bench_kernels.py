"""Each kernel against its plain twin, eager and under torch.compile: forward, and forward with backward.

Sizes are XXL/16's at 512 px, batch 8, in bf16. Beside each stands the traffic floor: the time that reading every input
and writing every output once takes at the rate given by --tb-per-second. It needs a GPU and Triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.bench.sides import Side, compare, show, show_floor
from training import kernels
from training.kernels import plain

CALLS = 10  # a round, so that launching does not drown what runs
SIDES = ("twin, eager", "twin, compiled", "kernel")

Function = Callable[..., Tensor]
Case = tuple[Function, Function, list[Tensor]]  # the kernel, its twin, what both are given


@dataclass(frozen=True)
class Sizes:
    images: int = 8
    tokens: int = 1024
    heads: int = 24
    head_dim: int = 64
    channels: int = 64
    ratio: int = 2
    pixels: int = 256
    device: str = "cuda"


def field(sizes: Sizes) -> Case:
    patches, channels = sizes.images * sizes.tokens, sizes.channels
    leaves = [(patches, sizes.pixels, channels), (channels,), (patches, 2 * sizes.ratio * channels**2)]
    return _both("field_product", (True,), leaves, sizes.device)


def modulate(sizes: Sizes) -> Case:
    hidden = sizes.heads * sizes.head_dim
    own = (sizes.images, 1, hidden)
    return _both("norm_modulate", (True,), [(sizes.images, sizes.tokens, hidden), (hidden,), own, own], sizes.device)


def rotate(sizes: Sizes) -> Case:
    angles = torch.rand(sizes.tokens, sizes.head_dim // 2, device=sizes.device)
    leaves = [(sizes.images, sizes.tokens, sizes.heads, sizes.head_dim), (sizes.head_dim,)]
    return _both("norm_rotate", (angles.cos(), angles.sin(), True), leaves, sizes.device)


CASES: dict[str, Callable[[Sizes], Case]] = {
    "field": field,
    "norm and modulation": modulate,
    "norm and rotary": rotate,
}


def _both(name: str, rest: tuple[object, ...], shapes: list[tuple[int, ...]], device: str) -> Case:
    def bound(function: Function) -> Function:
        return lambda *tensors: function(*tensors, *rest)

    leaves = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    return bound(getattr(kernels, name)), bound(getattr(plain, name)), leaves


def forward(function: Function, tensors: list[Tensor]) -> Side:
    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                function(*tensors)

    return run


def both_ways(function: Function, tensors: list[Tensor]) -> Side:
    g = torch.randn_like(function(*tensors))

    def run() -> None:
        for _ in range(CALLS):
            torch.autograd.grad(function(*tensors), tensors, g)

    return run


MODES: dict[str, Callable[[Function, list[Tensor]], Side]] = {"forward": forward, "forward and backward": both_ways}


def traffic(mode: str, bytes_each: list[int]) -> int:
    """The bytes of reading every input and writing every output once; the first input is x.

    Forward reads all and writes an x; backward reads all and a gradient, and writes a gradient for each.
    """
    return sum(bytes_each) + bytes_each[0] if mode == "forward" else 3 * sum(bytes_each) + 2 * bytes_each[0]


def measured(case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of CALLS calls, by mode and side."""
    kernel, twin, tensors = case
    torch._dynamo.reset()  # of the kernels before
    functions = dict(zip(SIDES, (twin, torch.compile(twin, dynamic=False), kernel), strict=True))
    return {
        mode: compare({side: make(function, tensors) for side, function in functions.items()}, rounds)
        for mode, make in MODES.items()
    }


def bench(name: str, options: argparse.Namespace) -> None:
    case = CASES[name](Sizes())
    bytes_each = [tensor.numel() * tensor.element_size() for tensor in case[2]]
    for mode, times in measured(case, options.rounds).items():
        print(f"\n{name}, {mode}, {CALLS} calls")
        show(times, SIDES[:2])
        show_floor(times, CALLS * traffic(mode, bytes_each) / (options.tb_per_second * 1e12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tb-per-second", type=float, default=4.8, help="what the GPU's memory carries")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no GPU here")
        return
    print(f"{torch.cuda.get_device_name()}, bf16, {Sizes().images} images of {Sizes().tokens} tokens")
    for name in CASES:
        bench(name, options)


if __name__ == "__main__":
    main()

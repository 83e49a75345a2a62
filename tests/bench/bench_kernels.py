"""Each kernel against its plain twin, eager and under torch.compile: forward, and forward with backward.

Sizes are XXL/16's at 512 px, batch 8, in bf16. Beside each stands the traffic floor: the time that reading every input
and writing every output once takes at the rate given by --tb-per-second. It needs a GPU and Triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tests.bench.sides import Side, compare, show, show_floor
from training import kernels
from training.kernels import plain

IMAGES, TOKENS, HEADS, HEAD_DIM = 8, 1024, 24, 64
CHANNELS, RATIO, PIXELS = 64, 2, 256
CALLS = 10  # a round, so that launching does not drown what runs

Function = Callable[..., Tensor]
Case = tuple[Function, Function, list[Tensor]]  # the kernel, its twin, what both are given


def field() -> Case:
    patches = IMAGES * TOKENS
    leaves = [(patches, PIXELS, CHANNELS), (CHANNELS,), (patches, 2 * RATIO * CHANNELS**2)]
    return _both("field_product", (True,), leaves)


def modulate() -> Case:
    hidden = HEADS * HEAD_DIM
    leaves = [(IMAGES, TOKENS, hidden), (hidden,), (IMAGES, 1, hidden), (IMAGES, 1, hidden)]
    return _both("norm_modulate", (True,), leaves)


def rotate() -> Case:
    angles = torch.rand(TOKENS, HEAD_DIM // 2, device="cuda")
    leaves = [(IMAGES, TOKENS, HEADS, HEAD_DIM), (HEAD_DIM,)]
    return _both("norm_rotate", (angles.cos(), angles.sin(), True), leaves)


def _both(name: str, rest: tuple[object, ...], shapes: list[tuple[int, ...]]) -> Case:
    def bound(function: Function) -> Function:
        return lambda *tensors: function(*tensors, *rest)

    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
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


def bench(name: str, make: Callable[[], Case], options: argparse.Namespace) -> None:
    kernel, twin, tensors = make()
    torch._dynamo.reset()  # of the kernels before
    compiled = torch.compile(twin, dynamic=False)
    sides = {"twin, eager": twin, "twin, compiled": compiled, "kernel": kernel}
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    # Forward reads all and writes an x; backward reads all and a gradient, and writes a gradient for each.
    floors = {forward: sum(sizes) + sizes[0], both_ways: 3 * sum(sizes) + 2 * sizes[0]}
    for mode, title in ((forward, "forward"), (both_ways, "forward and backward")):
        print(f"\n{name}, {title}, {CALLS} calls")
        times = compare({side: mode(function, tensors) for side, function in sides.items()}, options.rounds)
        show(times, ("twin, eager", "twin, compiled"))
        show_floor(times, CALLS * floors[mode] / (options.tb_per_second * 1e12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tb-per-second", type=float, default=4.8, help="what the GPU's memory carries")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no GPU here")
        return
    print(f"{torch.cuda.get_device_name()}, bf16, {IMAGES} images of {TOKENS} tokens")
    for name, make in (("field", field), ("norm and modulation", modulate), ("norm and rotary", rotate)):
        bench(name, make, options)


if __name__ == "__main__":
    main()

"""Peak memory of drawing one 1024 x 1024 picture, by the number of steps: it must not grow.

Each row is a process of its own, since a process never forgets its peak. The last column keeps every step's state and
velocity, as a sampler with a trajectory does.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

from tests.bench.bench_model import SMALL
from training.diffusion.samplers import guided, noise_for, solver, timesteps
from training.model import PRESETS, PixNerd, Text

SIZE, STEPS = 1024, (5, 25, 100)
NETWORKS = {"tiny": PRESETS["tiny"], "small": SMALL}  # small: 41 M parameters, trained at 128 px


def peak(name: str, size: int, steps: int, *, keep: bool = False) -> float:
    """MiB, measured in a new process."""
    arguments = [name, str(size), str(steps), *(["--keep"] if keep else [])]
    found = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_memory", "--one", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(found.stdout)


def _draw(name: str, size: int, steps: int, keep: bool) -> float:
    torch.manual_seed(0)
    config = NETWORKS[name].model_copy(update={"fixed_grid": True})
    net = PixNerd(config).eval()
    assert net.field is not None
    nn.init.normal_(net.field.out.weight, std=0.02)
    text, nothing = (Text(torch.randn(1, config.text_tokens, config.text_dim)) for _ in range(2))
    velocity = guided(net, text, nothing, 4.0)
    kept: list[Tensor] = []

    def keeping(x: Tensor, t: float) -> Tensor:
        kept.extend([x, velocity(x, t)])
        return kept[-1]

    solver("adams2")(keeping if keep else velocity, noise_for(0, (3, size, size))[None], timesteps(steps))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "SIZE", "STEPS"), help="measure this and print MiB")
    parser.add_argument("--keep", action="store_true", help="with --one: keep the trajectory")
    options = parser.parse_args()
    if options.one:
        name, size, steps = options.one
        print(_draw(name, int(size), int(steps), options.keep))
        return
    for name in NETWORKS:
        print(f"{name}, {SIZE} x {SIZE}, peak memory of the process")
        print("steps      ours    keeping the trajectory")
        found = []
        for steps in STEPS:
            found.append((peak(name, SIZE, steps), peak(name, SIZE, steps, keep=True)))
            print(f"{steps:5}  {found[-1][0]:6.0f} MiB {found[-1][1]:12.0f} MiB", flush=True)
        ours, keeping = (last - first for first, last in zip(found[0], found[-1], strict=True))
        state = 3 * SIZE**2 * 4 / 2**20
        print(
            f"from {STEPS[0]} to {STEPS[-1]} steps: {ours:+.0f} MiB, and {keeping:+.0f} MiB; a state is {state:.0f} MiB"
        )


if __name__ == "__main__":
    main()

"""What the engine costs: a training step of the tiny preset through DeepSpeed and the EMA, against bare PyTorch.

One rank, one thread, fp32, the same module and batch; the two run in turn, so that a noisy machine disturbs both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from training.diffusion.draws import draw, normal
from training.diffusion.objective import velocity_loss
from training.ema import Ema, EmaSettings
from training.engine import Engine
from training.model import PixNerd, Text, preset
from training.optim import OptimSettings, optimiser

OPTIM = OptimSettings(lr=1e-3)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = PixNerd(preset("tiny"))

    def forward(self, inputs: tuple[torch.Tensor, Text, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
        return velocity_loss(self.net, *inputs).per_sample_B.mean(), None


def bare(module: Step) -> Callable[[object], None]:
    adamw = optimiser(module.named_parameters(), OPTIM)

    def step(inputs: object) -> None:
        loss, _ = module(inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip)
        adamw.step()
        adamw.zero_grad()

    return step


def through_engine(module: Step, batch: int) -> Callable[[object], None]:
    engine = Engine(module, OPTIM, micro_batch=batch)
    ema = Ema(engine.masters, EmaSettings())

    def step(inputs: object) -> None:
        engine.step([inputs], OPTIM.lr)
        ema.update(engine.masters, 0)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        _compare(options)
        dist.destroy_process_group()


def _compare(options: argparse.Namespace) -> None:
    config = preset("tiny")
    assert config.image_size is not None
    shape = (3, config.image_size, config.image_size)
    drawn = draw(0, range(options.batch), shape)
    noise = normal(drawn.bits_BN, shape)
    text = Text(torch.randn(options.batch, config.text_tokens, config.text_dim))
    inputs = (torch.rand_like(noise) * 2 - 1, text, noise, drawn.t_B)
    sides = {"bare PyTorch": bare(Step()), "engine": through_engine(Step(), options.batch)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(options.rounds + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            for _ in range(options.steps):
                step(inputs)
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - began) / options.steps * 1e3)
    for name, found in times.items():
        print(f"{name:14} {statistics.median(found):7.1f} ms a step   [{min(found):.1f}, {max(found):.1f}]")
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    print(f"engine / bare  {statistics.median(ratios):7.2f} x          [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()

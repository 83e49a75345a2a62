"""What is learnt: the velocity along the path, with noise, times and dropped conditions drawn per sample.

Shapes: B images; x is [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.diffusion.path import interpolate, lognormal_time, velocity
from training.model.condition import Condition

# What a sample's random numbers are for: each has counters of its own, so one more use changes none of the others.
_NOISE, _TIME, _DROP = range(3)


class Draw(NamedTuple):
    noise_BCHW: Tensor
    t_B: Tensor
    drop_B: Tensor


def draw(
    seed: int,
    positions: Sequence[int],
    shape: tuple[int, ...],
    *,
    shift: float = 1.0,
    drop: float = 0.1,
) -> Draw:
    """Noise of `shape`, a time and a drop for each sample, on the CPU, from (seed, position) and nothing else.

    A position is the number of samples consumed before this one: it does not know of ranks or batches, and goes on
    counting in the next epoch. Philox is keyed by the pair, so any sample's numbers can be had without the others'.
    """
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    normal = np.empty(len(positions), dtype=np.float32)
    uniform = np.empty(len(positions), dtype=np.float32)
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    for index, position in enumerate(positions):
        _aim(philox, seed, position, _NOISE)
        generator.standard_normal(out=noise[index], dtype=np.float32)
        _aim(philox, seed, position, _TIME)
        normal[index] = generator.standard_normal()
        _aim(philox, seed, position, _DROP)
        uniform[index] = generator.random()
    return Draw(
        torch.from_numpy(noise), lognormal_time(torch.from_numpy(normal), shift), torch.from_numpy(uniform) < drop
    )


def _aim(philox: np.random.Philox, seed: int, position: int, stream: int) -> None:
    """Set the generator to the start of one sample's stream; far cheaper than making a new one."""
    philox.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array([0, 0, 0, stream], dtype=np.uint64),
            "key": np.array([seed, position], dtype=np.uint64),
        },
        "buffer": np.zeros(4, dtype=np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }


class Loss(NamedTuple):
    """The velocity loss of each sample, and the tapped block's tokens if they were asked for."""

    each_B: Tensor
    tokens_BNH: Tensor | None


def velocity_loss(
    net: Callable[..., Any],
    x_BCHW: Tensor,
    condition: Condition,
    noise_BCHW: Tensor,
    t_B: Tensor,
    tap: int | None = None,
) -> Loss:
    """Mean squared error of the velocity, per sample and in fp32.

    A network that predicts the image is given as what makes a velocity of it (`prediction.as_velocity`), so the loss is
    this one always.
    """
    x_t = interpolate(x_BCHW, noise_BCHW, t_B)
    target = velocity(x_BCHW, noise_BCHW).float()
    if tap is None:
        v, tokens = net(x_t, t_B, condition), None
    else:
        v, tokens = net(x_t, t_B, condition, tap)
    return Loss(F.mse_loss(v.float(), target, reduction="none").flatten(1).mean(1), tokens)


def by_time(each_B: Tensor, t_B: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of the losses in equal bins of t: what ranks and steps can add up before dividing."""
    index_B = (t_B * bins).long().clamp(0, bins - 1)
    sums = each_B.new_zeros(bins).index_add(0, index_B, each_B.detach())
    return sums, torch.bincount(index_B, minlength=bins)

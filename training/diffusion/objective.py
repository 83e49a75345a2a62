"""The training objective: the velocity loss, and the noise, time and condition dropout that are drawn per sample.

Flow matching loss: Lipman et al. 2022, arXiv 2210.02747; condition dropout: Ho and Salimans 2022, arXiv 2207.12598.

Shapes: B images; x is [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.diffusion.path import interpolate, logit_normal_time, velocity
from training.model.condition import Condition

# Each use of random numbers has a Philox stream of its own, so a further use would not change the others.
_NOISE, _TIME, _DROP = range(3)


class Draw(NamedTuple):
    noise_BCHW: Tensor
    t_B: Tensor
    drop_B: Tensor


def draw(seed: int, positions: Sequence[int], shape: tuple[int, ...], *, shift: float = 1.0, drop: float = 0.1) -> Draw:
    """Each sample's noise of `shape`, its time, and whether its condition is dropped, from (seed, position) alone.

    A position is the number of samples consumed before this one: it depends on neither ranks nor batches, and keeps
    counting over epochs. Philox is keyed by the pair, so one sample's numbers do not need the others'. It runs on the
    CPU, so that every device gets the same.
    """
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    normal = np.empty(len(positions), dtype=np.float32)
    uniform = np.empty(len(positions), dtype=np.float32)
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    for index, position in enumerate(positions):
        _seek(philox, seed, position, _NOISE)
        generator.standard_normal(out=noise[index], dtype=np.float32)
        _seek(philox, seed, position, _TIME)
        normal[index] = generator.standard_normal()
        _seek(philox, seed, position, _DROP)
        uniform[index] = generator.random()
    return Draw(
        torch.from_numpy(noise), logit_normal_time(torch.from_numpy(normal), shift), torch.from_numpy(uniform) < drop
    )


def _seek(philox: np.random.Philox, seed: int, position: int, stream: int) -> None:
    """Set the generator to the start of one sample's stream; far cheaper than a new generator."""
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
    """Each sample's velocity loss, and the tokens of the tapped block if `tap` was given."""

    per_sample_B: Tensor
    tokens_BNH: Tensor | None


def velocity_loss(
    net: Callable[..., Any],
    x_BCHW: Tensor,
    condition: Condition,
    noise_BCHW: Tensor,
    t_B: Tensor,
    tap: int | None = None,
) -> Loss:
    """|v - (x - noise)|^2 averaged over each sample's values, in fp32.

    A network that predicts the image is passed through `prediction.as_velocity` first, so the loss is always this one.
    """
    x_t = interpolate(x_BCHW, noise_BCHW, t_B)
    target = velocity(x_BCHW, noise_BCHW).float()
    if tap is None:
        v, tokens = net(x_t, t_B, condition), None
    else:
        v, tokens = net(x_t, t_B, condition, tap)
    return Loss(F.mse_loss(v.float(), target, reduction="none").flatten(1).mean(1), tokens)


def by_time(losses_B: Tensor, t_B: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of the losses in equal bins of t, which can be added up over ranks and steps before dividing."""
    index_B = (t_B * bins).long().clamp(0, bins - 1)
    sums = losses_B.new_zeros(bins).index_add(0, index_B, losses_B.detach())
    return sums, torch.bincount(index_B, minlength=bins)

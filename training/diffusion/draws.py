"""What is drawn at random for each sample: its noise, its time, whether its condition is dropped, which caption, and
which way its tokens take.

All of it is a function of (seed, position), where a position is the number of samples consumed before this one. So it
depends on neither ranks nor batches nor threads, and each epoch draws anew. The work is split in two: `draw` makes
random bits on the CPU, ahead of the step, and `normal` turns them into noise on the device that trains. The second half
is a table and one addition, which are exact, so every device makes the same noise.

Condition dropout: Ho and Salimans 2022, arXiv 2207.12598; a route is that of `training.model.routing`.

Shapes: B images, N random words a sample, M patches that are kept.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.diffusion.path import logit_normal_time

# Each use of random numbers has a stream of its own, so a further use would not change the others.
_NOISE, _TIME, _CONDITION, _ROUTE = range(4)
_WORDS = 1 << 16
_MIXING = 18  # outputs that SFC64's author leaves out after its state was set to a key

Routing = Callable[[tuple[int, ...]], tuple[int, int]]  # of images of a shape: their patches, and how many are kept


class Draw(NamedTuple):
    bits_BN: Tensor  # int16, for `normal`
    t_B: Tensor
    drop_B: Tensor
    choice_B: Tensor  # in [0, 1) and fp64, for `chosen`
    kept_BM: Tensor  # indices of patches, in order; none if no token is routed


def draw(
    seed: int,
    positions: Sequence[int],
    shape: tuple[int, ...],
    *,
    shift: float = 1.0,
    mean: float = 0.0,
    deviation: float = 1.0,
    drop: float = 0.1,
    routing: Routing | None = None,
    bits_BN: Tensor | None = None,
) -> Draw:
    """Each sample's random bits for noise of `shape`, its time, its condition's choice and drop, and its route.

    The bits are written to `bits_BN` where it is given: copying them would take a third of the time of drawing them.

    The generator is SFC64, which makes its bits in less than half of Philox's time. Its state is the key (seed,
    position, stream) and a counter. The step from one state to the next can be undone, so two keys never come to the
    same state.
    """
    bits_BN = torch.empty(len(positions), words(shape), dtype=torch.int16) if bits_BN is None else bits_BN
    normals = np.empty(len(positions), dtype=np.float32)
    uniforms = np.empty((2, len(positions)))
    patches, kept = (0, 0) if routing is None else routing(shape)
    routes = np.empty((len(positions), kept), dtype=np.int64)
    sfc64 = np.random.SFC64(0)
    generator = np.random.Generator(sfc64)
    for index, position in enumerate(positions):
        _seek(sfc64, seed, position, _NOISE)
        raw = sfc64.random_raw(bits_BN.shape[1] // 4)
        bits_BN.numpy()[index] = raw.astype("<u8", copy=False).view("<i2")
        _seek(sfc64, seed, position, _TIME)
        normals[index] = generator.standard_normal()
        _seek(sfc64, seed, position, _CONDITION)
        uniforms[:, index] = generator.random(2)
        if kept:
            _seek(sfc64, seed, position, _ROUTE)
            routes[index] = np.sort(np.argpartition(sfc64.random_raw(patches), kept - 1)[:kept])
    return Draw(
        bits_BN,
        logit_normal_time(torch.from_numpy(normals), shift, mean, deviation),
        torch.from_numpy(uniforms[0]) < drop,
        torch.from_numpy(uniforms[1]),
        torch.from_numpy(routes),
    )


def chosen(choice: float, weights: Sequence[float]) -> int:
    """The index that a choice in [0, 1) falls on, by weight."""
    ends = list(accumulate(weights))
    return min(bisect_right(ends, choice * ends[-1]), len(ends) - 1)


def words(shape: tuple[int, ...]) -> int:
    """The 16-bit words for a sample's noise: one a value, and whole outputs of the generator for both of `normal`'s."""
    return 8 * math.ceil(math.prod(shape) / 8)


def _seek(sfc64: np.random.SFC64, seed: int, position: int, stream: int) -> None:
    """Set the generator to the start of one sample's stream; far cheaper than a new generator."""
    sfc64.state = {
        "bit_generator": "SFC64",
        "state": {"state": np.array([seed, position, stream, 1], dtype=np.uint64)},
        "has_uint32": 0,
        "uinteger": 0,
    }
    sfc64.random_raw(_MIXING, output=False)


def normal(bits_BN: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [B, *shape] in fp32 from the bits of `draw`, on their device.

    Each 16 bits choose one of 65,536 quantiles of the normal distribution. A pair (a, b) of those becomes (a + b,
    a - b) over the root of 2: a rotation, under which two independent normals stay so. It spreads the values over 2^32
    combinations and the tails up to 5.9 deviations, where the quantiles alone end at 4.2.
    """
    batch, words = bits_BN.shape
    values = torch.index_select(_quantiles(bits_BN.device), 0, (bits_BN.int() + _WORDS // 2).view(-1))
    a, b = values.view(batch, words).chunk(2, 1)
    return torch.cat([a + b, a - b], 1)[:, : math.prod(shape)].reshape(batch, *shape)


@cache
def _quantiles(device: torch.device) -> Tensor:
    """The middle quantiles of equally likely ranges, with variance one half."""
    inverse = NormalDist().inv_cdf
    values = np.array([inverse((word + 0.5) / _WORDS) for word in range(_WORDS)])
    return torch.from_numpy((values / values.std() * math.sqrt(0.5)).astype(np.float32)).to(device)

"""From noise to images: pure functions `(velocity, x, times) -> x` over a velocity that may be guided.

Times are plain floats, so that asking whether guidance applies never waits for a device. The state is fp32 whatever
the network runs in, and only what a solver needs of the past is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from infra.config import nearest
from infra.errors import SettingsError
from training.diffusion.path import shift_time
from training.model.condition import Condition, Embedded, join

Velocity = Callable[[Tensor, float], Tensor]
Watch = Callable[[int, Tensor], None]  # called after each step with its number, from one, and the state


class Network(Protocol):
    """`PixNerd`, or whatever else gives velocities."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, condition: Embedded, /) -> Tensor: ...

    def embed(self, condition: Condition) -> Embedded: ...


class Solver(Protocol):
    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None) -> Tensor: ...


def timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1; a shift above 1 spends more of the steps on noisy images."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    times: list[float] = shift_time(u, shift).tolist()
    return times


def guided(
    net: Network,
    condition: Condition,
    nothing: Condition,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """v_u + scale (v_c - v_u) strictly inside of the interval, and v_c elsewhere, where v_u is then not computed.

    Both are had from one call of the network. `nothing` may be a single row that serves all images.
    """
    low, high = interval
    with torch.no_grad():
        alone, both = net.embed(condition), net.embed(join(condition, nothing))

    def velocity(x: Tensor, t: float) -> Tensor:
        t_B = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        if scale == 1 or not low < t < high:
            # A copy: a network that replays a CUDA graph writes its next output over this one.
            return net(x, t_B, alone).to(torch.float32, copy=True)
        v_c, v_u = net(torch.cat([x, x]), torch.cat([t_B, t_B]), both).float().chunk(2)
        return v_u + scale * (v_c - v_u)

    return velocity


@torch.no_grad()
def euler(velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None) -> Tensor:
    """x += dt v."""
    return adams(velocity, x, times, watch, order=1)


@torch.no_grad()
def heun(velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None) -> Tensor:
    """The mean of the velocities at both ends of a step, the far one after an Euler step; the last step is Euler's."""
    x = x.float()
    for index, (now, then) in enumerate(pairwise(times), start=1):
        v = velocity(x, now)
        if index < len(times) - 1:
            v = (v + velocity(x + (then - now) * v, then)) / 2
        x = x + (then - now) * v
        if watch is not None:
            watch(index, x)
    return x


@torch.no_grad()
def adams(
    velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None, *, order: int = 2
) -> Tensor:
    """Adams-Bashforth with uneven steps, of a lower order while history is short; order 4 is unstable in pixels."""
    x = x.float()
    past: deque[Tensor] = deque(maxlen=order)
    for index, (now, then) in enumerate(pairwise(times), start=1):
        past.append(velocity(x, now))
        weights = adams_weights(times[index - len(past) : index], now, then)
        x = x + (then - now) * sum((w * v for w, v in zip(weights, past, strict=True)), torch.zeros_like(x))
        if watch is not None:
            watch(index, x)
    return x


def adams_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The mean over [start, end] of each Lagrange polynomial through the nodes; together they make 1."""
    means = []
    with np.errstate(all="ignore"):  # times that all but coincide have no weights: what comes of them is not finite
        for node in nodes:
            others = [other for other in nodes if other != node]
            # Roots relative to the step's start keep the powers small.
            basis = np.polynomial.Polynomial.fromroots([other - start for other in others]) if others else None
            area = end - start if basis is None else basis.integ()(end - start)
            means.append(area / np.prod([node - other for other in others]))
        return [float(mean / sum(means)) for mean in means]


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    **{f"adams{order}": partial(adams, order=order) for order in (2, 3, 4)},  # of order 1 it is Euler's
}


def solver(name: str) -> Solver:
    if name in SOLVERS:
        return SOLVERS[name]
    near = nearest(name, SOLVERS)
    raise SettingsError(
        f"there is no solver {name!r}", remedy=f"did you mean {near!r}?" if near else f"known: {', '.join(SOLVERS)}"
    )


def noise_for(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The noise from which an image of this seed starts, on every device: drawn on the CPU in fp32."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

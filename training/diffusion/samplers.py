"""Solvers of dx/dt = v(x, t) from noise (t = 0) to an image (t = 1), as pure functions `(velocity, x, times) -> x`.

Times are Python floats, so that testing whether guidance applies never waits for a device. x is fp32 whatever the
network runs in, and a solver keeps only those past velocities that it needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from infra.config import nearest
from infra.errors import SettingsError
from training.diffusion.path import shift_time
from training.model.condition import Condition, Embedded, join

Velocity = Callable[[Tensor, float], Tensor]
Watch = Callable[[int, Tensor], None]  # called after each step with its number, counted from one, and x


class Network(Protocol):
    """`PixNerd`, or anything else that gives velocities."""

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, condition: Embedded, /) -> Tensor: ...

    def embed(self, condition: Condition) -> Embedded: ...


class Solver(Protocol):
    def __call__(self, velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None) -> Tensor: ...


def timesteps(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1; a shift above 1 spends more of the steps on noisy images."""
    return cast(list[float], shift_time(torch.arange(steps + 1, dtype=torch.float64) / steps, shift).tolist())


def guided(
    net: Network, condition: Condition, empty: Condition, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Classifier-free guidance: v_u + scale (v_c - v_u) strictly inside the interval, and v_c alone elsewhere.

    Ho and Salimans 2022, arXiv 2207.12598, Eq. 6 with scale = 1 + w; the interval is that of Kynkaanniemi et al. 2024,
    arXiv 2404.07724. Both velocities come from one call of the network; outside of the interval v_u is not computed.
    `empty` is the unconditional input; it may be a single row that serves all images.
    """
    low, high = interval
    with torch.no_grad():
        conditional, both = net.embed(condition), net.embed(join(condition, empty))

    def velocity(x: Tensor, t: float) -> Tensor:
        t_B = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        if scale == 1 or not low < t < high:
            # The copy is needed: a network that replays a CUDA graph overwrites this output at its next call.
            return net(x, t_B, conditional).to(torch.float32, copy=True)
        v_c, v_u = net(torch.cat([x, x]), torch.cat([t_B, t_B]), both).float().chunk(2)
        return v_u + scale * (v_c - v_u)

    return velocity


@torch.no_grad()
def euler(velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None) -> Tensor:
    """Euler's method: x += dt v."""
    return adams(velocity, x, times, watch, order=1)


@torch.no_grad()
def heun(velocity: Velocity, x: Tensor, times: Sequence[float], watch: Watch | None = None) -> Tensor:
    """Heun's method, x += dt (v(x, t) + v(x + dt v, t + dt)) / 2, with Euler's method for the last step.

    Karras et al. 2022, arXiv 2206.00364, Algorithm 1.
    """
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
    """Adams-Bashforth with variable steps; the first steps, which have fewer past velocities, are of a lower order.

    Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section III.5. PixNerd (arXiv 2507.23268)
    samples with order 2. Order 4 is unstable in pixel space.
    """
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
    """The weights w of x += dt sum(w v): each node's Lagrange polynomial averaged over [start, end]; they sum to 1.

    For even steps and order 2 they are [-0.5, 1.5].
    """
    means = []
    with np.errstate(all="ignore"):  # nodes that nearly coincide give weights that are not finite
        for node in nodes:
            others = [other for other in nodes if other != node]
            # Roots are taken relative to the step's start, which keeps the powers small.
            basis = np.polynomial.Polynomial.fromroots([other - start for other in others]) if others else None
            area = end - start if basis is None else basis.integ()(end - start)
            means.append(area / np.prod([node - other for other in others]))
        return [float(mean / sum(means)) for mean in means]


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    **{f"adams{order}": partial(adams, order=order) for order in (2, 3, 4)},  # order 1 is "euler"
}


def solver(name: str) -> Solver:
    if name in SOLVERS:
        return SOLVERS[name]
    near = nearest(name, SOLVERS)
    raise SettingsError(
        f"there is no solver {name!r}", remedy=f"did you mean {near!r}?" if near else f"known: {', '.join(SOLVERS)}"
    )


def noise_for(seed: int, shape: tuple[int, ...]) -> Tensor:
    """The noise that a seed starts from, drawn on the CPU in fp32 so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

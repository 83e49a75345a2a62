"""The linear path between noise (t = 0) and data (t = 1), and the times at which it is learnt.

Shapes: B images; every t is [B] and is spread over the remaining axes.
"""

from __future__ import annotations

from torch import Tensor


def spread(t_B: Tensor, like: Tensor) -> Tensor:
    """t as [B, 1, 1, ...], ready to be multiplied with `like`."""
    return t_B.view(-1, *(1 for _ in like.shape[1:]))


def interpolate(x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t = t x + (1 - t) noise."""
    t = spread(t_B, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The path's derivative by t, the same at every t."""
    return x - noise


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t / (t + (1 - t) shift): above 1, more of the work goes to noisy images."""
    return t / (t + (1 - t) * shift)


def lognormal_time(normal: Tensor, shift: float = 1.0) -> Tensor:
    return shift_time(normal.sigmoid(), shift)

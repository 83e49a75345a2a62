"""The linear path from noise (t = 0) to data (t = 1), and the distribution of the times at which it is learnt.

Rectified flow: Liu et al. 2022, arXiv 2209.03003; flow matching: Lipman et al. 2022, arXiv 2210.02747.

Shapes: B images; every t is [B] and is broadcast over the remaining axes.
"""

from __future__ import annotations

from torch import Tensor


def spread(t_B: Tensor, like: Tensor) -> Tensor:
    """t as [B, 1, 1, ...], which broadcasts against `like`."""
    return t_B.view(-1, *(1 for _ in like.shape[1:]))


def interpolate(x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t = t x + (1 - t) noise."""
    t = spread(t_B, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt = x - noise, the same at every t."""
    return x - noise


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t / (t + (1 - t) shift); a shift above 1 moves times towards noise.

    This is the resolution-dependent shift of Esser et al. 2024, arXiv 2403.03206, where t = 1 is noise.
    """
    return t / (t + (1 - t) * shift)


def logit_normal_time(normal: Tensor, shift: float = 1.0, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """The logit-normal times of Esser et al. 2024, arXiv 2403.03206, section 3.1, from standard normal numbers."""
    return shift_time((mean + deviation * normal).sigmoid(), shift)

"""How an average of the weights weighs the steps before it, and how one average is put together from others.

After update k an average moves by a rate r(k) towards the weights of that update, so at update t it holds those of
update k with r(k) (1 - r(k+1)) ... (1 - r(t)), and those from before the first update with (1 - r(1)) ... (1 - r(t)).
That is its profile. An exponential profile has a constant rate. A power-function profile has the shape k^gamma, which
is as wide at any t in relation to t; `sigma_rel` is its relative standard deviation. Averages that were kept at several
steps span many other profiles: Karras et al. 2023, arXiv 2312.02696, section 3 and its appendix on post-hoc EMA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from infra.records import Profile

GROUPS = 1 << 14  # a longer run is fitted by groups of steps, so that hundreds of profiles fit into memory
_RCOND = 1e-6  # combinations that hardly differ would be told apart by the rounding of what was stored


@cache
def exponent(sigma_rel: float) -> float:
    """The gamma of a width: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls with gamma."""

    def is_wider(gamma: float) -> bool:
        return (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > sigma_rel**2

    low, high = 0.0, 1.0
    while is_wider(high):
        high *= 2
    for _ in range(100):  # far more than a float can tell apart
        middle = (low + high) / 2
        low, high = (middle, high) if is_wider(middle) else (low, middle)
    return low


def rate(profile: Profile, update: int) -> float:
    """How far the average moves towards the weights at this update, counted from 1."""
    if profile.sigma_rel is not None:
        power = exponent(profile.sigma_rel) + 1
        return -math.expm1(power * math.log1p(-1 / update)) if update > 1 else 1.0  # 1 - (1 - 1/k)^(gamma + 1)
    assert profile.decay is not None
    return 1 - (min(profile.decay, update / (update + 9)) if profile.warmup else profile.decay)


def weights(profile: Profile, update: int, last: int) -> Tensor:
    """The profile at an update, [last + 1] in float64; the first entry is of the weights before the first update."""
    k = torch.arange(1, update + 1, dtype=torch.float64)
    if profile.sigma_rel is not None:
        rates = -torch.expm1((exponent(profile.sigma_rel) + 1) * torch.log1p(-1 / k))
    else:
        assert profile.decay is not None
        decays = (k / (k + 9)).clamp(max=profile.decay) if profile.warmup else torch.full_like(k, profile.decay)
        rates = 1 - decays
    left = torch.log1p(-rates).flip(0).cumsum(0).flip(0)  # of update k and all after it; -inf where a rate is 1
    after = torch.cat([left[1:], left.new_zeros(1)])
    rest = left.new_zeros(last - update)
    return torch.cat([left[:1].exp(), rates * after.exp(), rest])


class Kept(NamedTuple):
    """An average as of an update."""

    profile: Profile
    update: int


class Fit(NamedTuple):
    shares: list[float]  # of each average that there is; they add up to 1
    misplaced: float  # the part of the weight that lies at other updates than it should: 0 is exact, 1 all of it


def fit(wanted: Kept, kept: Sequence[Kept]) -> Fit:
    """The combination of the kept averages whose profile is nearest to the wanted one, by least squares.

    The shares add up to 1, which Karras et al. leave to the fit: all profiles then hold the same weight in all, and
    what is misplaced costs only as much as the weights have changed between the updates in question.
    """
    if wanted in kept:
        return Fit([float(k == kept.index(wanted)) for k in range(len(kept))], 0.0)
    last = max(each.update for each in (wanted, *kept))
    size = -(-(last + 1) // GROUPS)

    def grouped(each: Kept) -> Tensor:
        profile = weights(*each, last)
        return torch.nn.functional.pad(profile, (0, -len(profile) % size)).view(-1, size).sum(1)

    first, *others = (grouped(each) for each in kept)
    shares = [1.0]
    if others:
        columns = torch.stack([other - first for other in others], 1)
        target = (grouped(wanted) - first)[:, None]
        solved = torch.linalg.lstsq(columns, target, rcond=_RCOND, driver="gelsd").solution[:, 0].tolist()
        shares = [1 - math.fsum(solved), *solved]
    rest = weights(*wanted, last)
    for share, each in zip(shares, kept, strict=True):
        rest -= share * weights(*each, last)
    return Fit(shares, float(rest.abs().sum()) / 2)

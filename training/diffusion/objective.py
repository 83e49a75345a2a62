"""The training objective: the velocity loss, and its sums by time.

Flow matching loss: Lipman et al. 2022, arXiv 2210.02747.

Shapes: B images; x is [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.diffusion.path import interpolate, velocity
from training.model.condition import Condition
from training.model.routing import Route


class Loss(NamedTuple):
    """Each sample's velocity loss, the tokens of the tapped block if `tap` was given, and what was predicted of what.

    Where the tapped block is one that tokens skip, these are the tokens that do not.
    """

    per_sample_B: Tensor
    tokens_BNH: Tensor | None
    v_BCHW: Tensor
    x_t_BCHW: Tensor


def velocity_loss(
    net: Callable[..., Any],
    x_BCHW: Tensor,
    condition: Condition,
    noise_BCHW: Tensor,
    t_B: Tensor,
    tap: int | None = None,
    route: Route | None = None,
) -> Loss:
    """|v - (x - noise)|^2 averaged over each sample's values, in fp32.

    A network that predicts the image is passed through `prediction.as_velocity` first, so the loss is always this one.
    """
    x_t = interpolate(x_BCHW, noise_BCHW, t_B)
    target = velocity(x_BCHW, noise_BCHW).float()
    routed = {} if route is None else {"route": route}  # so that any function of three arguments is a network
    if tap is None:
        v, tokens = net(x_t, t_B, condition, **routed), None
    else:
        v, tokens = net(x_t, t_B, condition, tap, **routed)
    return Loss(F.mse_loss(v.float(), target, reduction="none").flatten(1).mean(1), tokens, v, x_t)


def by_time(losses_B: Tensor, t_B: Tensor, bins: int, weight_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums and counts of the losses in equal bins of t, which can be added up over ranks and steps before dividing.

    A sample counts with its weight, if these are given.
    """
    index_B = (t_B * bins).long().clamp(0, bins - 1)
    weight_B = torch.ones_like(losses_B) if weight_B is None else weight_B.to(losses_B)
    sums, counts = (losses_B.new_zeros(bins).index_add(0, index_B, v) for v in (losses_B.detach() * weight_B, weight_B))
    return sums, counts

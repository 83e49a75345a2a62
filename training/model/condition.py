"""What a network is called with beside the image and the time: labels, or captions as features.

Shapes: B images, R text rows (each may serve several images), T text tokens, E text features, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Captions as features. `rows` says which row each image reads, so that text shared by images is worked once.

    The network's own text blocks know the time, so images that share a row must share their time too.
    """

    features_RTE: Tensor
    mask_RT: Tensor | None = None
    rows_B: Tensor | None = None


class TextTokens(NamedTuple):
    """Text inside of the network: before its own blocks the same at every time, after them what the image attends to.

    The mask is None where pads are attended to like words.
    """

    y_RTH: Tensor
    mask_RT: Tensor | None
    rows_B: Tensor | None


# Labels [B], bare features [B, T, E], or Text.
Condition = Tensor | Text
# What `PixNerd.embed` makes of it.
Embedded = Tensor | TextTokens


def as_text(condition: Condition) -> Text:
    return condition if isinstance(condition, Text) else Text(condition)


def shown(text: Text) -> Tensor:
    """Which tokens are words, [R, T]; without a mask all of them are."""
    if text.mask_RT is None:
        return torch.ones(text.features_RTE.shape[:2], dtype=torch.bool, device=text.features_RTE.device)
    return text.mask_RT.bool()


def join(first: Condition, second: Condition) -> Condition:
    """The conditions of two batches, one behind the other; a single caption of the second serves as many images."""
    if not isinstance(first, Text) and not first.is_floating_point():
        assert isinstance(second, Tensor)
        return torch.cat([first, second.to(first).expand(len(first))])
    one, two = as_text(first), as_text(second)
    rows1, rows2 = _rows(one), _rows(two)
    if len(rows2) == 1:
        rows2 = rows2.expand(len(rows1))
    features = torch.cat([one.features_RTE, two.features_RTE.to(one.features_RTE)])
    mask = None if one.mask_RT is None and two.mask_RT is None else torch.cat([shown(one), shown(two)])
    return Text(features, mask, torch.cat([rows1, rows2 + len(one.features_RTE)]))


def _rows(text: Text) -> Tensor:
    return torch.arange(len(text.features_RTE), device=text.features_RTE.device) if text.rows_B is None else text.rows_B

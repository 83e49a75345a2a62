"""The condition that a network gets beside the image and the time: labels, or features of captions.

Shapes: B images, R text rows (each may serve several images), T text tokens, E text features, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Features of captions. `rows_B` tells each image's row, so that text which images share is processed once.

    The network's text blocks depend on the time, so images that share a row must have the same time.
    """

    features_RTE: Tensor
    mask_RT: Tensor | None = None
    rows_B: Tensor | None = None


class TextTokens(NamedTuple):
    """Text inside the network: the input of its text blocks (independent of the time), and their output.

    The mask is None if pads are attended to like words.
    """

    y_RTH: Tensor
    mask_RT: Tensor | None
    rows_B: Tensor | None


Condition = Tensor | Text  # a tensor is labels [B], or features [B, T, E] without masks
Embedded = Tensor | TextTokens  # what `PixNerd.embed` returns: labels, or text


def as_text(condition: Condition) -> Text:
    return condition if isinstance(condition, Text) else Text(condition)


def _mask(text: Text) -> Tensor:
    """Which tokens are no pads, [R, T]; without a mask none are."""
    if text.mask_RT is None:
        return torch.ones(text.features_RTE.shape[:2], dtype=torch.bool, device=text.features_RTE.device)
    return text.mask_RT.bool()


def join(first: Condition, second: Condition) -> Condition:
    """The conditions of two batches as one batch's; a single label or caption in the second serves all its images."""
    if not isinstance(first, Text) and not first.is_floating_point():
        assert isinstance(second, Tensor)
        return torch.cat([first, second.to(first).expand(len(first))])
    one, two = as_text(first), as_text(second)
    rows1, rows2 = _rows(one), _rows(two)
    if len(rows2) == 1:
        rows2 = rows2.expand(len(rows1))
    features = torch.cat([one.features_RTE, two.features_RTE.to(one.features_RTE)])
    mask = None if one.mask_RT is None and two.mask_RT is None else torch.cat([_mask(one), _mask(two)])
    return Text(features, mask, torch.cat([rows1, rows2 + len(one.features_RTE)]))


def _rows(text: Text) -> Tensor:
    return torch.arange(len(text.features_RTE), device=text.features_RTE.device) if text.rows_B is None else text.rows_B

"""Bilinear resizing of 8-bit pictures, bit by bit as OpenCV does it, by which mmdetection prepares pictures.

It computes with weights of 11 bits and cuts digits off in three places; a detector's scores near a threshold depend
on it. Pillow's and torch's bilinear filters give other pixels, and average over more of them where a picture shrinks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

_ONE = 1 << 11  # a weight of 1


def fitting(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The largest height and width of the same proportions with sides of at most `short` and `long`."""
    scale = min(long / max(height, width), short / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resized(image_HWC: Image, height: int, width: int) -> Image:
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    left, right, share = _taps(image_HWC.shape[1], width)
    share = np.where(left == right, np.float32(0), share)  # at the edges; along the other axis OpenCV keeps the shares
    first, second = (weight[:, None] for weight in _weights(share))
    rows = image_HWC.astype(np.int32)
    rows = (rows[:, left] * first + rows[:, right] * second) >> 4
    top, bottom, share = _taps(image_HWC.shape[0], height)
    first, second = (weight[:, None, None] for weight in _weights(share))
    mixed = ((rows[top] * first) >> 16) + ((rows[bottom] * second) >> 16)
    return ((mixed + 2) >> 2).astype(np.uint8)


def _taps(before: int, after: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """For each new pixel along an axis: the two old ones that it is mixed from, and the second one's share."""
    place = ((np.arange(after) + 0.5) * (before / after) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.intp)
    share = place - first.astype(np.float32)
    return first.clip(0, before - 1), (first + 1).clip(0, before - 1), share


def _weights(share: npt.NDArray[np.float32]) -> list[npt.NDArray[np.int32]]:
    return [np.rint(part * np.float32(_ONE)).astype(np.int32) for part in (1 - share, share)]

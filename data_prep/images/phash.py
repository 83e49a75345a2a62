"""A perceptual hash: 64 bits that stay nearly the same when a picture is stored again, smaller, or a little brighter.

Luma is (77 R + 150 G + 29 B) / 256. It is averaged over each cell of a 32 x 32 grid (exact areas, whatever the size or
aspect, so it is antialiased), and the grid is transformed by the 2-D DCT-II. The hash is made of the 64 lowest
frequencies without the constant one, in zig-zag order ((0, 1), (1, 0), (0, 2), ... (9, 0), (0, 10), ... (9, 1)): JPEG
noise changes them less than the 8 x 8 corner, which has higher frequencies. A bit is set if its coefficient is above
the median of the 64. So half of the bits are set, distances are even, and a limit of 3 is the same as 2.

A picture without content has no hash: if too many coefficients are as near to the median as noise is, their bits are
noise too, and all flat pictures would be duplicates of each other.

The arithmetic is in integers, which floats hold exactly, so that the order of additions does not matter: the hash is
the same on every machine. Colour does not count, and mirrored or rotated pictures have other hashes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GRID = 32
LUMA = np.array([77.0, 150.0, 29.0])  # in 256ths
FINE = 64  # a cell's mean is rounded down to 1 / FINE of a luma level
ONE = 1 << 12  # a cosine of 1 as an integer
NOISE = 1.0  # luma levels: an orthonormal coefficient this near to the median may cross it when stored as JPEG
WEAK = 16  # the most of the 64 coefficients that may be that near

LOWEST = sorted(((u, v) for u in range(11) for v in range(11)), key=lambda uv: (sum(uv), uv))[1:65]
ROW_64, COLUMN_64 = np.array(LOWEST).T
WAVE_11G = np.rint(ONE * np.cos(np.pi * np.outer(np.arange(11), 2 * np.arange(GRID) + 1) / (2 * GRID)))
WAVE_11G[0] = np.rint(ONE / np.sqrt(2))  # in proportion, the transform is orthonormal
LEVEL = FINE * ONE**2 * GRID / 2  # one luma level in an orthonormal coefficient


def phash(pixels_HW3: npt.NDArray[np.uint8]) -> int | None:
    """The hash of an sRGB picture; None if it has too little content."""
    wave_64 = (WAVE_11G @ _grid(pixels_HW3) @ WAVE_11G.T)[ROW_64, COLUMN_64]
    above_64 = 2 * wave_64 - np.sort(wave_64)[31:33].sum()  # twice the distance from the median
    if np.count_nonzero(np.abs(above_64) < 2 * NOISE * LEVEL) > WEAK:
        return None
    return int.from_bytes(np.packbits(above_64 > 0).tobytes(), "big")


def _grid(pixels_HW3: npt.NDArray[np.uint8]) -> Floats:
    """Each cell's mean luma, in whole steps of 1 / FINE."""
    height, width, _ = pixels_HW3.shape
    # 255 x 257 fits into 16 bits, which are summed much faster than 32.
    sums_GN = _strips(pixels_HW3.reshape(height, width * 3), np.uint16 if height <= 257 * GRID else np.uint32)
    luma_GW = sums_GN.reshape(GRID, width, 3) @ LUMA
    cells = _strips(luma_GW.T, np.float64).T
    return np.asarray(np.floor(cells * FINE / (256 * _tall(height) * _tall(width))))


def _tall(height: int) -> int:
    """The height of a strip: in rows or, if not all strips begin with a whole row, in 32nds of a row."""
    return height if height % GRID else height // GRID


def _strips(rows_HN: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """(32, N) sums over 32 strips of equal height, in the unit of `_tall`."""
    height, length = rows_HN.shape
    if height % GRID == 0:
        return np.asarray(rows_HN.reshape(GRID, -1, length).sum(axis=1, dtype=dtype))
    row, part = np.divmod(np.arange(GRID + 1) * height, GRID)
    whole = [rows_HN[start:end].sum(axis=0, dtype=dtype) for start, end in pairwise(row)]
    before = rows_HN[np.minimum(row, height - 1)] * part[:, None].astype(np.float64)  # of the row at each cut
    return np.asarray(np.stack(whole) * float(GRID) + before[1:] - before[:-1])

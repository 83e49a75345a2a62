"""Rotary positions (RoPE, Su et al. 2021, arXiv 2104.09864) on both axes of a grid of patches.

Shapes: N patches, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.model.tables import constant_table


class RotaryTable(NamedTuple):
    """cos and sin of each position's d/2 angles, [N, d/2]; angle i rotates the values (2i, 2i+1) of a head.

    Where each image has positions of its own, they are those of all images in a row, [B N, d/2].
    """

    cos: Tensor
    sin: Tensor


@constant_table
def rotary_table(rows: int, columns: int, head_dim: int, extent: float | None, device: torch.device) -> RotaryTable:
    """Angles x f_0, y f_0, x f_1, y f_1, ... with f_j = 10000^(-4j/d), row-major over the grid, end points included."""
    # Text to image: x ends at the number of rows and y at that of columns, because the published weights learnt that.
    x_end, y_end = (rows, columns) if extent is None else (extent, extent)
    x = torch.linspace(0, x_end, columns, dtype=torch.float64)
    y = torch.linspace(0, y_end, rows, dtype=torch.float64)
    j = torch.arange(head_dim // 4, dtype=torch.float64)
    f = 10000.0 ** (-4 * j / head_dim)
    y_grid, x_grid = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack([x_grid.reshape(-1, 1) * f, y_grid.reshape(-1, 1) * f], dim=-1).flatten(1)
    return RotaryTable(angles.cos().float().to(device), angles.sin().float().to(device))

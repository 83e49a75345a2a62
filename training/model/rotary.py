"""Rotary positions over a grid of patches (RoPE, arXiv 2104.09864, on both axes).

Shapes: N patches, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.model.tables import constant_table


class RotaryTable(NamedTuple):
    """cos and sin of every position's d/2 angles, [N, d/2]; pairs (2i, 2i+1) of a head are rotated by angle i."""

    cos: Tensor
    sin: Tensor


@constant_table
def rotary_table(rows: int, columns: int, head_dim: int, extent: float | None, device: torch.device) -> RotaryTable:
    """Angles x f0, y f0, x f1, y f1, ... over the grid, row-major; end points are included."""
    # Text to image counts x to the number of rows and y to that of columns: so the published weights learnt it.
    x_end, y_end = (rows, columns) if extent is None else (extent, extent)
    x = torch.linspace(0, x_end, columns, dtype=torch.float64)
    y = torch.linspace(0, y_end, rows, dtype=torch.float64)
    j = torch.arange(head_dim // 4, dtype=torch.float64)
    f = 10000.0 ** (-4 * j / head_dim)
    y_grid, x_grid = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack([x_grid.reshape(-1, 1) * f, y_grid.reshape(-1, 1) * f], dim=-1).flatten(1)
    return RotaryTable(angles.cos().float().to(device), angles.sin().float().to(device))

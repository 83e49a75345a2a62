"""Patch features of images from a DINOv2 in Hugging Face's format: the target of representation alignment.

Shapes: B images, N patches, V features; a grid is (rows, columns) of the denoiser's patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.encoders import load_model, quiet

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class VisionEncoder(nn.Module):
    """DINOv2's patch tokens after its final norm, one for each of the denoiser's patches; always frozen."""

    def __init__(self, source: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = load_model(source, dtype)
        self.model.requires_grad_(False).eval()
        self.patch_size = int(self.model.config.patch_size)
        self._tables: dict[tuple[int, int], Tensor] = {}

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def forward(self, x_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [B, N, V] of images in [-1, 1], resized so that DINOv2's patches coincide with the denoiser's.

        Gradients go to the images, if these want them.
        """
        size = (self.patch_size * grid[0], self.patch_size * grid[1])
        resized = F.interpolate((x_BCHW.float() + 1) / 2, size=size, mode="bicubic", antialias=False)
        mean, std = (torch.tensor(v, device=x_BCHW.device).view(3, 1, 1) for v in (_MEAN, _STD))
        tokens_BNV = self.model.embeddings.patch_embeddings(((resized - mean) / std).to(self.model.dtype))
        cls_B1V = self.model.embeddings.cls_token.expand(len(tokens_BNV), -1, -1)
        hidden = torch.cat([cls_B1V, tokens_BNV], dim=1) + self._table(grid)
        return cast(Tensor, self.model.layernorm(self.model.encoder(hidden).last_hidden_state)[:, 1:])

    def _table(self, grid: tuple[int, int]) -> Tensor:
        """The position table, interpolated to another grid as DINOv2's own code does it, once for each grid.

        That code adds 0.1 to the grid, divides by the side, and interpolates by that factor. transformers does not add
        it, which would give every token a slightly different position.
        """
        table = self.model.embeddings.position_embeddings
        cached = self._tables.get(grid)
        if cached is not None and cached.device == table.device and cached.dtype == table.dtype:
            return cached
        side = round((table.shape[1] - 1) ** 0.5)
        cls, patches = table[:, :1], table[:, 1:]
        if grid != (side, side):
            square = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
            patches = F.interpolate(square, scale_factor=factors, mode="bicubic").to(table.dtype)
            assert patches.shape[-2:] == grid
            patches = patches.flatten(2).transpose(1, 2)
        self._tables[grid] = torch.cat([cls, patches], dim=1)
        return self._tables[grid]


def build_tiny(
    folder: str | Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    patch_size: int = 8,
    image_size: int = 32,
    seed: int = 0,
) -> None:
    """Write a small DINOv2 with random weights in Hugging Face's format."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch_size,
        image_size=image_size,
        layerscale_value=1.0,
    )
    quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Dinov2Model(config).save_pretrained(folder)

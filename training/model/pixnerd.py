"""PixNerd (arXiv 2507.23268): a transformer over patches, whose tokens give the weights of a neural field per patch.

Shapes: B images, N patches, P = B N, p patch size, K pixels of a patch, H hidden, R text rows, T text tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.model.blocks import Block
from training.model.condition import Condition, Embedded, TextTokens, as_text
from training.model.embed import TextEmbedding, TimeEmbedding, check_times
from training.model.field import Field, LinearHead
from training.model.presets import ModelConfig
from training.model.rotary import rotary_table
from training.model.routing import Route, positions_of, put_back, taken


class PixNerd(nn.Module):
    """`net(x_BCHW, t_B, condition)` predicts the velocity at x, or the image if `prediction` is image.

    The condition is labels, features, or `Text`. `training.diffusion.prediction` turns an image into a velocity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.stem = nn.Linear(3 * config.patch_size**2, hidden)
        self.time = TimeEmbedding(hidden)
        self.text = TextEmbedding(config) if config.task == "text" else None
        self.label = nn.Embedding(config.classes + 1, hidden) if config.task == "class" else None
        self.trunk = nn.ModuleList(Block(config, rotary=True, text=config.task == "text") for _ in range(config.blocks))
        self.field = Field(config) if config.field_blocks else None
        self.head = None if config.field_blocks else LinearHead(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises what differs from PyTorch's defaults; unlike DiT's, the modulation is not zeroed."""
        nn.init.xavier_uniform_(self.stem.weight)
        nn.init.zeros_(self.stem.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        for embedding in (self.time, self.text):
            if embedding is not None:
                embedding.reset_parameters()
        for last in (self.field, self.head):
            if last is not None:
                nn.init.zeros_(last.out.weight)
                nn.init.zeros_(last.out.bias)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        condition: Condition | TextTokens,
        tap: int | None = None,
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction; with `tap=k` also the tokens [B, N, H] after the trunk's k-th block, counted from one.

        With a route, only the kept tokens go through its blocks, and only these are tapped there: [B, M, H].
        """
        assert tap is None or 1 <= tap <= len(self.trunk)
        self.config.check_size(x_BCHW.shape[-2], x_BCHW.shape[-1])
        pixels_BCHW = x_BCHW.to(self.stem.weight.dtype)
        embedded = condition if isinstance(condition, TextTokens) else self.embed(condition)
        check_times(embedded, t_B)
        time_BH = self.time(t_B)
        tokens_BNH, tapped = self._trunk(self._shrink(pixels_BCHW), time_BH, embedded, tap, route)
        out_BCHW = self._draw(pixels_BCHW, tokens_BNH, time_BH)
        return out_BCHW if tapped is None else (out_BCHW, tapped)

    def embed(self, condition: Condition) -> Embedded:
        """The part of the condition's embedding that does not depend on the time, which a sampler computes only once.

        The result can be passed in place of the condition.
        """
        if self.text is not None:
            return self.text.embed(as_text(condition))
        assert isinstance(condition, Tensor)
        return condition

    def _shrink(self, x_BCHW: Tensor) -> Tensor:
        """The trunk's input image, which is resized to the training size if the grid is fixed."""
        if not self.config.fixed_grid:
            return x_BCHW
        side = self.config.grid * self.config.patch_size
        if x_BCHW.shape[-2:] == (side, side):
            return x_BCHW
        return F.interpolate(x_BCHW, size=(side, side), mode="nearest")

    def _trunk(
        self, x_BCHW: Tensor, time_BH: Tensor, embedded: Embedded, tap: int | None, route: Route | None
    ) -> tuple[Tensor, Tensor | None]:
        p = self.config.patch_size
        rows, columns = x_BCHW.shape[-2] // p, x_BCHW.shape[-1] // p
        x_BNH = self.stem(_cut(x_BCHW, rows, columns).flatten(2))
        text: TextTokens | None = None
        if isinstance(embedded, TextTokens):
            assert self.text is not None
            text = self.text(embedded, time_BH)
            cond_BH = F.silu(time_BH)
        else:
            assert self.label is not None
            cond_BH = F.silu(time_BH + self.label(embedded))
        rotary = rotary_table(rows, columns, self.config.head_dim, self.config.rope_extent, x_BCHW.device)
        mask = _joint_mask(text, rows * columns)
        places, keys = rotary, mask  # of the tokens that go through a block
        whole_BNH, tapped = x_BNH, None
        for index, block in enumerate(self.trunk, start=1):
            if route is not None and index == route.first:
                whole_BNH, x_BNH = x_BNH, taken(x_BNH, route.kept_BM)
                places, keys = positions_of(rotary, route.kept_BM), _joint_mask(text, x_BNH.shape[1])
            x_BNH = block(x_BNH, cond_BH, places, text, keys)
            if index == tap:
                tapped = x_BNH
            if route is not None and index == route.last:
                x_BNH, places, keys = put_back(whole_BNH, route.kept_BM, x_BNH), rotary, mask
        return x_BNH, tapped

    def _draw(self, x_BCHW: Tensor, tokens_BNH: Tensor, time_BH: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        rows, columns = self.config.patches(height, width)
        if self.field is not None:
            s_PH = F.silu(tokens_BNH + time_BH[:, None]).flatten(0, 1)
            pixels_PK3 = _cut(x_BCHW, rows, columns).flatten(0, 1).transpose(1, 2)
            out_PK3 = self.field(pixels_PK3, s_PH, height // rows, width // columns)
        else:
            assert self.head is not None
            out_PK3 = self.head(tokens_BNH.flatten(0, 1))
        return _join(out_PK3, rows, columns, height, width)


def _cut(x_BCHW: Tensor, rows: int, columns: int) -> Tensor:
    """Patches in row-major order, channel-major inside: [B, N, C, K]."""
    x = x_BCHW.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # B C rows ph columns pw
    patches_BNCK: Tensor = x.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)
    return patches_BNCK


def _join(x_PK3: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    x = x_PK3.unflatten(1, (height // rows, width // columns)).unflatten(0, (-1, rows, columns))
    image_BCHW: Tensor = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, height, width)
    return image_BCHW


def _joint_mask(text: TextTokens | None, tokens: int) -> Tensor | None:
    """[B, 1, 1, N + T], True for keys that are attended to: every patch, and the image's caption without its pads."""
    if text is None or text.mask_RT is None:
        return None
    mask_BT = text.mask_RT if text.rows_B is None else text.mask_RT[text.rows_B]
    return torch.cat([mask_BT.new_ones(len(mask_BT), tokens), mask_BT], dim=1)[:, None, None, :]

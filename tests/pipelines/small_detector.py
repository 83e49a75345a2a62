"""A small Mask2Former with random weights in mmdetection's layout, and its logits computed by hand from that layout.

Shapes: B images, C channels, H and W rows and columns, T tokens, Q queries.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]

WIDTH, WINDOW, HEADS, DEPTH, PATCH = 8, 3, (1, 2, 2, 4), 2, 4  # of Swin
FEATURES, ATTENTION, ENCODER, DECODER, QUERIES, CLASSES = 32, 2, 2, 3, 7, 80
LEVELS, POINTS = 3, 4


class _Random:
    """Weights with the names that mmdetection gives them."""

    def __init__(self, seed: int) -> None:
        self.made, self.rng = State(), torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> None:
        self.made[f"{name}.weight"] = self.normal(*shape) * scale / math.prod(shape[1:]) ** 0.5

    def both(self, name: str, *shape: int, scale: float = 1.0) -> None:
        self.weight(name, *shape, scale=scale)
        self.made[f"{name}.bias"] = self.normal(shape[0]) * 0.1 * scale

    def norm(self, name: str, size: int) -> None:
        self.made[f"{name}.weight"] = 1 + 0.2 * self.normal(size)
        self.made[f"{name}.bias"] = 0.1 * self.normal(size)

    def transformed(self, layer: str, inner: int, norms: int) -> None:
        """The rest of a layer of a transformer, beside its attention."""
        self.both(f"{layer}.ffns.0.layers.0.0", inner, FEATURES)
        self.both(f"{layer}.ffns.0.layers.1", FEATURES, inner)
        for place in range(norms):
            self.norm(f"{layer}.norms.{place}", FEATURES)

    def backbone(self) -> None:
        self.both("backbone.patch_embed.projection", WIDTH, 3, PATCH, PATCH)
        self.norm("backbone.patch_embed.norm", WIDTH)
        for stage, heads in enumerate(HEADS):
            size = WIDTH * 2**stage
            for number in range(DEPTH):
                self.block(f"backbone.stages.{stage}.blocks.{number}", size, heads)
            if stage < len(HEADS) - 1:
                self.norm(f"backbone.stages.{stage}.downsample.norm", 4 * size)
                self.weight(f"backbone.stages.{stage}.downsample.reduction", 2 * size, 4 * size)
            self.norm(f"backbone.norm{stage}", size)

    def block(self, name: str, size: int, heads: int) -> None:
        self.norm(f"{name}.norm1", size)
        self.made[f"{name}.attn.w_msa.relative_position_bias_table"] = self.normal((2 * WINDOW - 1) ** 2, heads)
        self.made[f"{name}.attn.w_msa.relative_position_index"] = offsets(WINDOW)
        self.both(f"{name}.attn.w_msa.qkv", 3 * size, size)
        self.both(f"{name}.attn.w_msa.proj", size, size)
        self.norm(f"{name}.norm2", size)
        self.both(f"{name}.ffn.layers.0.0", 4 * size, size)
        self.both(f"{name}.ffn.layers.1", size, 4 * size)

    def pixel_decoder(self) -> None:
        pixels = "panoptic_head.pixel_decoder"
        for level in range(LEVELS):
            self.both(f"{pixels}.input_convs.{level}.conv", FEATURES, WIDTH * 2 ** (3 - level), 1, 1)
            self.norm(f"{pixels}.input_convs.{level}.gn", FEATURES)
        for number in range(ENCODER):
            layer = f"{pixels}.encoder.layers.{number}"
            self.both(f"{layer}.attentions.0.sampling_offsets", ATTENTION * LEVELS * POINTS * 2, FEATURES)
            self.both(f"{layer}.attentions.0.attention_weights", ATTENTION * LEVELS * POINTS, FEATURES)
            self.both(f"{layer}.attentions.0.value_proj", FEATURES, FEATURES)
            self.both(f"{layer}.attentions.0.output_proj", FEATURES, FEATURES)
            self.transformed(layer, 24, 2)
        self.weight(f"{pixels}.level_encoding", LEVELS, FEATURES)
        self.weight(f"{pixels}.lateral_convs.0.conv", FEATURES, WIDTH, 1, 1)
        self.norm(f"{pixels}.lateral_convs.0.gn", FEATURES)
        self.weight(f"{pixels}.output_convs.0.conv", FEATURES, FEATURES, 3, 3)
        self.norm(f"{pixels}.output_convs.0.gn", FEATURES)
        self.both(f"{pixels}.mask_feature", FEATURES, FEATURES, 1, 1)

    def decoder(self, sure: float) -> None:
        for number in range(DECODER):
            layer = f"panoptic_head.transformer_decoder.layers.{number}"
            for place in range(2):
                attention = f"{layer}.attentions.{place}.attn"
                self.made[f"{attention}.in_proj_weight"] = self.normal(3 * FEATURES, FEATURES) / FEATURES**0.5
                self.made[f"{attention}.in_proj_bias"] = self.normal(3 * FEATURES) * 0.1
                self.both(f"{attention}.out_proj", FEATURES, FEATURES)
            self.transformed(layer, 20, 3)
        self.norm("panoptic_head.transformer_decoder.post_norm", FEATURES)
        for name in ("query_embed", "query_feat"):
            self.weight(f"panoptic_head.{name}", QUERIES, FEATURES, scale=FEATURES**0.5)
        self.weight("panoptic_head.level_embed", LEVELS, FEATURES)
        self.both("panoptic_head.cls_embed", CLASSES + 1, FEATURES, scale=sure)
        for place in (0, 2, 4):
            self.both(f"panoptic_head.mask_embed.{place}", FEATURES, FEATURES)


def state(seed: int = 0, sure: float = 1.0) -> State:
    """`sure` scales the logits of classes."""
    random = _Random(seed)
    random.backbone()
    random.pixel_decoder()
    random.decoder(sure)
    return random.made


def offsets(window: int) -> Tensor:
    """For each two positions of a window, the row of the table of biases for what lies between them."""
    index = torch.zeros(window**2, window**2, dtype=torch.long)
    for a in range(window**2):
        for b in range(window**2):
            down, right = a // window - b // window, a % window - b % window
            index[a, b] = (down + window - 1) * (2 * window - 1) + right + window - 1
    return index


def write(path: Path, seed: int = 0, sure: float = 1.0) -> Path:
    torch.save({"meta": {"CLASSES": ("person",), "epoch": 1}, "state_dict": state(seed, sure)}, path)
    return path


class ByHand:
    """The network's computations, each line from mmdetection's layout, in float64."""

    def __init__(self, state: State) -> None:
        self.state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def conv(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        x = F.conv2d(x, self.state[f"{name}.conv.weight"], self.state.get(f"{name}.conv.bias"), padding=padding)
        return F.group_norm(x, 32, self.state[f"{name}.gn.weight"], self.state[f"{name}.gn.bias"])

    def swin_block(self, name: str, x_BHWC: Tensor, heads: int, shift: int) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        x = F.pad(self.norm(f"{name}.norm1", x_BHWC), (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        rows, columns = x.shape[1:3]
        region = torch.zeros(rows, columns)
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            for number, (top, left) in enumerate((a, b) for a in range(3) for b in range(3)):
                cuts = (slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))
                region[cuts[top], cuts[left]] = number
        out = torch.zeros_like(x)
        table = self.state[f"{name}.attn.w_msa.relative_position_bias_table"]
        bias = table[offsets(WINDOW)].permute(2, 0, 1)
        for top in range(0, rows, WINDOW):
            for left in range(0, columns, WINDOW):
                window = x[:, top : top + WINDOW, left : left + WINDOW].flatten(1, 2)
                qkv = self.linear(f"{name}.attn.w_msa.qkv", window).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
                scores = qkv[0] @ qkv[1].transpose(-1, -2) / qkv.shape[-1] ** 0.5 + bias
                own = region[top : top + WINDOW, left : left + WINDOW].flatten()
                scores = scores - 100.0 * (own[:, None] != own[None])
                mixed = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)
                mixed = self.linear(f"{name}.attn.w_msa.proj", mixed).unflatten(1, (WINDOW, WINDOW))
                out[:, top : top + WINDOW, left : left + WINDOW] = mixed
        x = x_BHWC + out.roll((shift, shift), (1, 2))[:, :height, :width]
        inner = F.gelu(self.linear(f"{name}.ffn.layers.0.0", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.ffn.layers.1", inner)

    def merged(self, name: str, x_BHWC: Tensor) -> Tensor:
        x = x_BHWC.permute(0, 3, 1, 2)
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        size = (x.shape[2] // 2, x.shape[3] // 2)
        x = self.norm(f"{name}.norm", F.unfold(x, 2, stride=2).transpose(1, 2))
        return self.linear(f"{name}.reduction", x).unflatten(1, size)

    def backbone(self, x_B3HW: Tensor) -> list[Tensor]:
        weight, bias = (self.state[f"backbone.patch_embed.projection.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(x_B3HW, weight, bias, stride=PATCH).permute(0, 2, 3, 1)
        x = self.norm("backbone.patch_embed.norm", x)
        features = []
        for stage, heads in enumerate(HEADS):
            for number in range(DEPTH):
                x = self.swin_block(f"backbone.stages.{stage}.blocks.{number}", x, heads, WINDOW // 2 * (number % 2))
            features.append(self.norm(f"backbone.norm{stage}", x).permute(0, 3, 1, 2))
            if stage < len(HEADS) - 1:
                x = self.merged(f"backbone.stages.{stage}.downsample", x)
        return features

    def deformable(self, name: str, x_BTC: Tensor, at_BTC: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Each token mixes values at its own place, moved by offsets, on each level; between pixels linearly."""
        attention = f"{name}.attentions.0"
        query = x_BTC + at_BTC
        tokens = x_BTC.shape[1]
        shape = (ATTENTION, LEVELS, POINTS)
        moves = self.linear(f"{attention}.sampling_offsets", query)[0].unflatten(-1, (*shape, 2))
        shares = self.linear(f"{attention}.attention_weights", query)[0].unflatten(-1, (ATTENTION, -1))
        shares = shares.softmax(-1).unflatten(-1, (LEVELS, POINTS))
        values = self.linear(f"{attention}.value_proj", x_BTC)[0].unflatten(-1, (ATTENTION, -1))
        maps = [v.unflatten(0, size) for v, size in zip(values.split([h * w for h, w in sizes]), sizes, strict=True)]
        places = [((c + 0.5) / w, (r + 0.5) / h) for h, w in sizes for r in range(h) for c in range(w)]
        out = torch.zeros(tokens, ATTENTION, values.shape[-1], dtype=torch.float64)
        for token, (x, y) in enumerate(places):
            for head in range(ATTENTION):
                for level, (height, width) in enumerate(sizes):
                    for point in range(POINTS):
                        dx, dy = moves[token, head, level, point].tolist()
                        value = between(maps[level][:, :, head], y * height + dy - 0.5, x * width + dx - 0.5)
                        out[token, head] += shares[token, head, level, point] * value
        z = x_BTC + self.linear(f"{attention}.output_proj", out.flatten(1)[None])
        z = self.norm(f"{name}.norms.0", z)
        inner = F.relu(self.linear(f"{name}.ffns.0.layers.0.0", z))
        return self.norm(f"{name}.norms.1", z + self.linear(f"{name}.ffns.0.layers.1", inner))

    def pixel_decoder(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        name = "panoptic_head.pixel_decoder"
        tokens, at, sizes = [], [], []
        for level in range(LEVELS):
            x = self.conv(f"{name}.input_convs.{level}", features[3 - level])
            sizes.append((x.shape[2], x.shape[3]))
            tokens.append(x.flatten(2).transpose(1, 2))
            at.append(position(*sizes[-1]) + self.state[f"{name}.level_encoding.weight"][level])
        x = torch.cat(tokens, 1)
        for number in range(ENCODER):
            x = self.deformable(f"{name}.encoder.layers.{number}", x, torch.cat(at)[None], sizes)
        parts = x.split([h * w for h, w in sizes], 1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        finest = self.conv(f"{name}.lateral_convs.0", features[0])
        finest = finest + F.interpolate(levels[-1], finest.shape[-2:], mode="bilinear", align_corners=False)
        finest = F.relu(self.conv(f"{name}.output_convs.0", finest, padding=1))
        weight, bias = (self.state[f"{name}.mask_feature.{part}"] for part in ("weight", "bias"))
        return F.conv2d(finest, weight, bias), levels

    def attention(self, name: str, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        weights, biases = (self.state[f"{name}.attn.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (ATTENTION, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None], -math.inf)
        return self.linear(f"{name}.attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def decoder_layer(self, name: str, x: Tensor, own: Tensor, seen: Tensor, at: Tensor, hidden: Tensor) -> Tensor:
        x = x + self.attention(f"{name}.attentions.0", x + own, seen + at, seen, hidden)
        x = self.norm(f"{name}.norms.0", x)
        x = self.norm(f"{name}.norms.1", x + self.attention(f"{name}.attentions.1", x + own, x + own, x, None))
        inner = F.relu(self.linear(f"{name}.ffns.0.layers.0.0", x))
        return self.norm(f"{name}.norms.2", x + self.linear(f"{name}.ffns.0.layers.1", inner))

    def heads(self, x_BQC: Tensor, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm("panoptic_head.transformer_decoder.post_norm", x_BQC)
        classes, mask = self.linear("panoptic_head.cls_embed", x), x
        for place in (0, 2, 4):
            mask = self.linear(f"panoptic_head.mask_embed.{place}", F.relu(mask) if place else mask)
        return classes, torch.einsum("bqc,bchw->bqhw", mask, pixels_BCHW)

    def logits(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the classes [B, Q, K + 1], and those of the masks [B, Q, h, w]."""
        pixels, levels = self.pixel_decoder(self.backbone(x_B3HW.double()))
        x, own = (self.state[f"panoptic_head.{name}.weight"][None] for name in ("query_feat", "query_embed"))
        for number in range(DECODER):
            level = levels[number % LEVELS]
            seen = level.flatten(2).transpose(1, 2) + self.state["panoptic_head.level_embed.weight"][number % LEVELS]
            _, masks = self.heads(x, pixels)
            masks = F.interpolate(masks, level.shape[-2:], mode="bilinear", align_corners=False)
            hidden = masks.flatten(2) < 0
            hidden = hidden & ~hidden.all(-1, keepdim=True)
            at = position(*level.shape[-2:])[None]
            layer = f"panoptic_head.transformer_decoder.layers.{number}"
            x = self.decoder_layer(layer, x, own, seen, at, hidden)
        return self.heads(x, pixels)


def between(map_HWC: Tensor, y: float, x: float) -> Tensor:
    """The value between four pixels; outside all is zero."""
    height, width, size = map_HWC.shape
    value = torch.zeros(size, dtype=torch.float64)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * map_HWC[row, column]
    return value


def position(height: int, width: int) -> Tensor:
    """Sines and cosines of the row, then of the column, each counted from 1 and scaled to 2 pi [H * W, C]."""
    half = FEATURES // 2
    out = torch.zeros(height, width, FEATURES, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for first, number, count in ((0, row, height), (half, column, width)):
                angle = (number + 1) / (count + 1e-6) * 2 * math.pi
                for k in range(half):
                    turned = angle / 10_000 ** (2 * (k // 2) / half)
                    out[row, column, first + k] = math.cos(turned) if k % 2 else math.sin(turned)
    return out.flatten(0, 1)

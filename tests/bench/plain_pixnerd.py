"""The published network written down plainly: what the model bench compares ours with.

It says what the specification says, one operation after another: complex rotary positions, patches by unfold and fold,
the field's weights normalised into new tensors, text for each image of its own, and the unconditional pass run at every
step. Layouts are those of the authors' code, and its tables are worked out once, as there; the bench says how its time
compares with theirs. Its parameters have the published names, so that the
golden arrays' weights load as they are.

Shapes: B images, N patches, T text tokens, H hidden, h heads, d head size, P = B N, K pixels of a patch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.diffusion.samplers import adams_weights
from training.model.presets import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * self.weight).to(x.dtype)


def rotary(rows: int, columns: int, head_dim: int) -> Tensor:
    """exp(i angle) of every position, [N, d/2]."""
    f = 1 / 10000 ** (torch.arange(0, head_dim, 4)[: head_dim // 4].float() / head_dim)
    x, y = torch.linspace(0, rows, columns), torch.linspace(0, columns, rows)
    y_grid, x_grid = torch.meshgrid(y, x, indexing="ij")
    angles = torch.stack([torch.outer(x_grid.flatten(), f), torch.outer(y_grid.flatten(), f)], dim=-1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_BhNd: Tensor, table_ND: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BhNd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_ND).flatten(3).to(x_BhNd.dtype)


def heads_first(x_BNX: Tensor, parts: int, heads: int) -> Tensor:
    """[parts, B, h, N, d], so that each head's tokens lie together, as attention reads them."""
    return x_BNX.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """The image's, with text beside it."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_x = nn.Linear(hidden, 3 * hidden, bias=False)
        self.kv_y = nn.Linear(hidden, 2 * hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(hidden // heads), RMSNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x_BNH: Tensor, y_BTH: Tensor, table_ND: Tensor) -> Tensor:
        q, k, v = heads_first(self.qkv_x(x_BNH), 3, self.heads)
        q, k = rotate(self.q_norm(q.contiguous()), table_ND), rotate(self.k_norm(k.contiguous()), table_ND)
        k_text, v_text = heads_first(self.kv_y(y_BTH), 2, self.heads)
        k, v = torch.cat([k, self.k_norm(k_text.contiguous())], dim=2), torch.cat([v, v_text], dim=2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class TextAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(hidden // heads), RMSNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, y_BTH: Tensor) -> Tensor:
        q, k, v = heads_first(self.qkv(y_BTH), 3, self.heads)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden, 8 * hidden, bias=False)
        self.w3 = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, hidden: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(hidden), RMSNorm(hidden)
        self.attn = attention
        self.mlp = SwiGLU(hidden)
        self.adaLN_modulation = nn.Sequential(nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, c_B1H: Tensor, *beside: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_B1H).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), *beside)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FieldBlock(nn.Module):
    def __init__(self, hidden: int, channels: int, ratio: int) -> None:
        super().__init__()
        self.channels, self.inner = channels, ratio * channels
        self.param_generator1 = nn.Sequential(nn.Linear(hidden, 2 * channels * self.inner))
        self.norm = RMSNorm(channels)

    def forward(self, x_PKC: Tensor, s_PH: Tensor) -> Tensor:
        w1, w2 = self.param_generator1(s_PH).chunk(2, dim=-1)
        w1 = F.normalize(w1.view(-1, self.channels, self.inner), dim=-2)
        w2 = w2.view(-1, self.inner, self.channels)
        y = torch.bmm(F.silu(torch.bmm(self.norm(x_PKC), w1)), w2)
        return x_PKC + y


class PlainPixNerd(nn.Module):
    """The published text-to-image network: FC1 normalised, the cosine coordinate code, square images."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads, channels = config.hidden, config.heads, config.field_channels
        self.config = config
        self.patch_size, self.head_dim = config.patch_size, config.head_dim
        self.s_embedder = _under("proj", nn.Linear(3 * config.patch_size**2, hidden))
        self.t_embedder = _under("mlp", nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden)))
        self.y_embedder = nn.ModuleDict({"proj": nn.Linear(config.text_dim, hidden), "norm": RMSNorm(hidden)})
        self.y_pos_embedding = nn.Parameter(torch.randn(1, config.text_tokens, hidden))
        self.text_refine_blocks = nn.ModuleList(
            Block(hidden, TextAttention(hidden, heads)) for _ in range(config.text_blocks)
        )
        trunk = [Block(hidden, Attention(hidden, heads)) for _ in range(config.blocks)]
        field = [FieldBlock(hidden, channels, config.field_ratio) for _ in range(config.field_blocks)]
        self.blocks = nn.ModuleList([*trunk, *field])
        self.trunk_blocks = config.blocks
        self.x_embedder = _under("embedder", nn.Sequential(nn.Linear(67, channels)))
        self.final_layer = _under("linear", nn.Linear(channels, 3))
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._codes: dict[torch.dtype, Tensor] = {}

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_BTE: Tensor) -> Tensor:
        p, (height, width) = self.patch_size, x_BCHW.shape[-2:]
        patches_BNK = F.unfold(x_BCHW, p, stride=p).transpose(1, 2)
        batch, tokens, _ = patches_BNK.shape
        time_B1H = self._time(t_B)[:, None]
        cond_B1H = F.silu(time_B1H)

        y_BTH = self.y_embedder["norm"](self.y_embedder["proj"](y_BTE)) + self.y_pos_embedding
        for block in self.text_refine_blocks:
            y_BTH = block(y_BTH, cond_B1H)

        table_ND = self._rotary(height // p, width // p, x_BCHW.device)
        s_BNH = self.s_embedder["proj"](patches_BNK)
        for block in self.blocks[: self.trunk_blocks]:
            s_BNH = block(s_BNH, cond_B1H, y_BTH, table_ND)

        s_PH = F.silu(time_B1H + s_BNH).flatten(0, 1)
        pixels_PK3 = patches_BNK.reshape(batch * tokens, 3, p * p).transpose(1, 2)
        code_PKD = self._code(pixels_PK3).expand(batch * tokens, -1, -1)
        x_PKC = self.x_embedder["embedder"](torch.cat([pixels_PK3, code_PKD], dim=-1))
        for block in self.blocks[self.trunk_blocks :]:
            x_PKC = block(x_PKC, s_PH)
        out_PK3 = self.final_layer["linear"](x_PKC)
        folded = out_PK3.transpose(1, 2).reshape(batch, tokens, -1).transpose(1, 2)
        return F.fold(folded, (height, width), p, stride=p)

    def _time(self, t_B: Tensor) -> Tensor:
        f = torch.exp(-math.log(10) * torch.arange(128, device=t_B.device).float() / 128)
        angles = t_B.float()[:, None] * f
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.t_embedder["mlp"](features.to(self.y_pos_embedding.dtype))

    def _rotary(self, rows: int, columns: int, device: torch.device) -> Tensor:
        if (rows, columns) not in self._tables:
            self._tables[rows, columns] = rotary(rows, columns, self.head_dim).to(device)
        return self._tables[rows, columns]

    def _code(self, like: Tensor) -> Tensor:
        if like.dtype not in self._codes:
            at = torch.linspace(0, 16, self.patch_size)
            y, x = torch.meshgrid(at, at, indexing="ij")
            f = 1 / 10000 ** (torch.arange(0, 128, 4).float() / 128)
            code = torch.stack([torch.outer(x.flatten(), f).cos(), torch.outer(y.flatten(), f).cos()], dim=-1)
            self._codes[like.dtype] = code.flatten(1)[None].to(like)
        return self._codes[like.dtype]


def _under(name: str, module: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({name: module})


def loss(net: nn.Module, x: Tensor, noise: Tensor, t_B: Tensor, y_BTE: Tensor) -> Tensor:
    t = t_B.view(-1, 1, 1, 1)
    return F.mse_loss(net(t * x + (1 - t) * noise, t_B, y_BTE), x - noise)


@torch.no_grad()
def sample(
    net: nn.Module,
    noise: Tensor,
    cond_BTE: Tensor,
    uncond_BTE: Tensor,
    times: Sequence[float],
    guidance: float,
    interval: tuple[float, float],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Adams-2 with guidance; the unconditional pass runs at every step, and every state and velocity is kept."""
    x, trajectory, velocities = noise, [noise], []
    both_BTE = torch.cat([uncond_BTE, cond_BTE])
    for index, now in enumerate(times[:-1]):
        t_B = torch.full((2 * len(x),), now, dtype=x.dtype, device=x.device)
        unconditional, conditional = net(torch.cat([x, x]), t_B, both_BTE).chunk(2)
        scale = guidance if interval[0] < now < interval[1] else 1.0
        velocities.append(unconditional + scale * (conditional - unconditional))
        nodes = times[max(0, index - 1) : index + 1]
        weights = adams_weights(nodes, now, times[index + 1])
        steps = zip(weights, velocities[-len(nodes) :], strict=True)
        x = x + (times[index + 1] - now) * sum(w * v for w, v in steps)
        trajectory.append(x)
    return x, trajectory, velocities

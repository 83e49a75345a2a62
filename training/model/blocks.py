"""The transformer block (DiT, Peebles and Xie 2022, arXiv 2212.09748), for images with or without text and for text.

Shapes: B images, N tokens, H hidden, h heads, d head size, R text rows, T text tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.kernels import norm_modulate, norm_rotate
from training.kernels.plain import rms_norm
from training.model.condition import TextTokens
from training.model.presets import ModelConfig
from training.model.rotary import RotaryTable


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, arXiv 1910.07467; see `rms_norm` for `weight_in_fp32`."""

    def __init__(self, size: int, *, weight_in_fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.weight_in_fp32 = weight_in_fp32

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.weight_in_fp32)

    def modulated(self, x_BNH: Tensor, shift_B1H: Tensor, scale_B1H: Tensor) -> Tensor:
        return norm_modulate(x_BNH, self.weight, shift_B1H, scale_B1H, self.weight_in_fp32)

    def rotated(self, x_BNhd: Tensor, table: RotaryTable | None) -> Tensor:
        if table is None:
            return rms_norm(x_BNhd, self.weight, self.weight_in_fp32)
        if len(table.cos) == x_BNhd.shape[1]:
            return norm_rotate(x_BNhd, self.weight, table.cos, table.sin, self.weight_in_fp32)
        # Each image has positions of its own: to the operation, all tokens are those of one image.
        row_1Nhd = x_BNhd.flatten(0, 1)[None]
        rotated_1Nhd = norm_rotate(row_1Nhd, self.weight, table.cos, table.sin, self.weight_in_fp32)
        return rotated_1Nhd.view(x_BNhd.shape)


class Attention(nn.Module):
    """Self-attention with QK-norm; with text, its keys and values are appended to the image's."""

    def __init__(self, config: ModelConfig, *, text: bool) -> None:
        super().__init__()
        hidden, norm = config.hidden, config.norm_weight_in_fp32
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.kv_text = nn.Linear(hidden, 2 * hidden, bias=False) if text else None
        self.q_norm = RMSNorm(self.head_dim, weight_in_fp32=norm)
        self.k_norm = RMSNorm(self.head_dim, weight_in_fp32=norm)
        self.out = nn.Linear(hidden, hidden)

    def forward(
        self, x_BNH: Tensor, rotary: RotaryTable | None, text: TextTokens | None, mask: Tensor | None
    ) -> Tensor:
        q, k, v = self.qkv(x_BNH).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        q, k = self.q_norm.rotated(q, rotary), self.k_norm.rotated(k, rotary)
        if self.kv_text is not None and text is not None:
            k_text, v_text = self.kv_text(text.y_RTH).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
            k_text = self.k_norm(k_text)
            if text.rows_B is not None:
                k_text, v_text = k_text[text.rows_B], v_text[text.rows_B]
            k, v = torch.cat([k, k_text], dim=1), torch.cat([v, v_text], dim=1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return cast(Tensor, self.out(y.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_value = nn.Linear(hidden, 2 * inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return cast(Tensor, self.out(F.silu(gate) * value))


class Block(nn.Module):
    """x += gate1 Attn(mod(norm1 x)); x += gate2 SwiGLU(mod(norm2 x)). SiLU was already applied to `cond_BH`."""

    def __init__(self, config: ModelConfig, *, rotary: bool, text: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.norm1 = RMSNorm(config.hidden, weight_in_fp32=config.norm_weight_in_fp32)
        self.attn = Attention(config, text=text)
        self.norm2 = RMSNorm(config.hidden, weight_in_fp32=config.norm_weight_in_fp32)
        self.mlp = SwiGLU(config.hidden, config.mlp_hidden)
        self.modulation = nn.Linear(config.hidden, 6 * config.hidden)
        if config.open_gates:
            with torch.no_grad():
                for gate in (2, 5):
                    self.modulation.bias.unflatten(0, (6, -1))[gate].fill_(1.0)

    def forward(
        self,
        x_BNH: Tensor,
        cond_BH: Tensor,
        rotary: RotaryTable | None = None,
        text: TextTokens | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond_BH)[:, None].chunk(6, dim=-1)
        y = self.attn(self.norm1.modulated(x_BNH, shift1, scale1), rotary, text, mask)
        x_BNH = torch.addcmul(x_BNH, gate1, y)
        y = self.mlp(self.norm2.modulated(x_BNH, shift2, scale2))
        return torch.addcmul(x_BNH, gate2, y)

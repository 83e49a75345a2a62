"""A Qwen3 over captions without the work that nobody needs: pads that are masked, and repeated empty captions.

Packed, the words of all captions stand in one row, so products and norms see no pads. Only attention, a hundredth of
the work at these lengths, lays captions out side by side again. Length-sorting, the other way, would leave pads within
each group and launch every kernel once a group. A word sees no pads in either layout, as Qwen3 looks back only.

How many words there are is known on the CPU, so nothing waits for the device. Shapes: B captions, T tokens, S words of
all captions together, L words of the longest, E features, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from infra.errors import CheckpointError

_PACKED = "pixnerd_packed"  # the name under which transformers calls `_attend`


class Layout(NamedTuple):
    """Where packed words stand if captions are laid out side by side."""

    place_S: Tensor
    rows: int
    longest: int


def takes_packed(model: Any, source: str | Path) -> None:
    """Lets a model attend within packed captions."""
    from transformers import AttentionInterface

    config = model.config
    if config.model_type != "qwen3" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise CheckpointError(
            f"{source} is no Qwen3 with full attention, so its captions cannot be packed",
            remedy="name another encoder, or set pack_text to false",
        )
    AttentionInterface.register(_PACKED, _attend)
    model.set_attn_implementation(_PACKED)


def packed(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, lengths: Sequence[int], pad: int | None
) -> tuple[Tensor, Tensor | None]:
    """Features [B, T, E], zeros where there are no words; with `pad` also the features of that token by itself.

    Asked for `pad`, the model is always called exactly once, as ranks that share out its weights must call it alike.
    """
    count, longest = sum(lengths), max(1, *lengths)
    batch, tokens = ids_BT.shape
    device = ids_BT.device
    # Words before pads, each in order. `nonzero` would do it too, but waits for the device to tell how many there are.
    index_S = mask_BT.flatten().to(torch.int8).argsort(descending=True, stable=True)[:count]
    ids_S, position_S = ids_BT.flatten()[index_S], index_S % tokens
    place_S = index_S // tokens * longest + position_S
    if pad is not None:
        ids_S = torch.cat([ids_S, ids_S.new_full((1,), pad)])
        position_S = F.pad(position_S, (0, 1))
        place_S = F.pad(place_S, (0, 1), value=batch * longest)
    if not len(ids_S):
        width = int(model.config.hidden_size)
        return torch.zeros(batch, tokens, width, dtype=model.dtype, device=device), None
    layout = Layout(place_S, batch + 1, longest)
    output = model(input_ids=ids_S[None], position_ids=position_S[None], use_cache=False, layout=layout)
    features_SE = output.last_hidden_state[0]
    features = features_SE.new_zeros(batch * tokens, features_SE.shape[1])
    features_BTE = features.index_copy(0, index_S, features_SE[:count]).unflatten(0, (batch, tokens))
    return features_BTE, None if pad is None else features_SE[count]


def padded(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, lengths: Sequence[int], pad: int | None
) -> tuple[Tensor, Tensor | None]:
    """The same of captions with their pads; zeros where a caption is empty."""
    count = sum(length > 0 for length in lengths)
    row_N = mask_BT.any(1).to(torch.int8).argsort(descending=True, stable=True)[:count]
    ids_NT, mask_NT = ids_BT[row_N], mask_BT[row_N]
    if pad is not None:
        ids_NT, mask_NT = F.pad(ids_NT, (0, 0, 0, 1), value=pad), F.pad(mask_NT, (0, 0, 0, 1), value=1)
    shape = (*ids_BT.shape, int(model.config.hidden_size))
    if not len(ids_NT):
        return torch.zeros(shape, dtype=model.dtype, device=ids_BT.device), None
    features_NTE = model(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False).last_hidden_state
    features_BTE = features_NTE.new_zeros(shape).index_copy(0, row_N, features_NTE[:count])
    return features_BTE, None if pad is None else features_NTE[count, 0]


def _attend(
    module: Any,
    q_1hSd: Tensor,
    k_1hSd: Tensor,
    v_1hSd: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each caption. Places without a word attend to zeros, and nobody reads them."""
    del module, attention_mask
    q, k, v = ((x if layout is None else _side_by_side(x[0], layout)) for x in (q_1hSd, k_1hSd, v_1hSd))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    if layout is None:
        return y.transpose(1, 2), None
    return y.transpose(1, 2).flatten(0, 1)[layout.place_S][None], None


def _side_by_side(x_hSd: Tensor, layout: Layout) -> Tensor:
    flat = x_hSd.new_zeros(layout.rows * layout.longest, x_hSd.shape[0], x_hSd.shape[2])
    rows = flat.index_copy(0, layout.place_S, x_hSd.transpose(0, 1))
    return cast(Tensor, rows.unflatten(0, (layout.rows, layout.longest))).transpose(1, 2)

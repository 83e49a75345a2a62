"""Encodes captions with a Qwen3 in Hugging Face's format and its tokenizer, published or tiny.

Shapes: B captions, T tokens, E features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.encoders import load_model, quiet, unusable
from training.model.condition import Text

MOST_CACHED = 100_000  # captions whose token ids are kept
PAD = "<|endoftext|>"  # Qwen's own pad token


class TextEncoder(nn.Module):
    """The last hidden state, after the final norm, of captions truncated or right-padded to T tokens.

    The last `train_layers` layers are trained; if that is all of them, the token embeddings are as well. With
    `rounded`, features are rounded to bf16 and then cast back to the model's dtype.
    """

    def __init__(
        self,
        source: str | Path,
        tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        train_layers: int = 0,
        rounded: bool = False,
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        self.model = load_model(source, dtype)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise unusable(source, error) from None
        self.tokens = tokens
        self._ids: dict[str, list[int]] = {}  # token ids by caption, as captions recur in a corpus
        self.trains, self.rounded = train_layers > 0, rounded
        _unfreeze(self.model, train_layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, both [B, T], without a chat template; an empty caption has T pads and a mask of zeros."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._ids))
        if new:
            if len(self._ids) + len(new) > MOST_CACHED:
                self._ids.clear()
                new = list(dict.fromkeys(captions))
            ids = self.tokenizer(new, truncation=True, max_length=self.tokens)["input_ids"]
            self._ids.update(zip(new, ids, strict=True))
        ids_BT = torch.full((len(captions), self.tokens), self.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, caption in enumerate(captions):
            ids = self._ids[caption]
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask_BT[row, : len(ids)] = 1
        return ids_BT, mask_BT

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Text:
        # An empty caption is encoded without a mask: attention kernels disagree about rows that are masked throughout.
        attended_BT = torch.where(mask_BT.any(1, keepdim=True), mask_BT, 1)
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            features_BTE = self.model(input_ids=ids_BT, attention_mask=attended_BT, use_cache=False).last_hidden_state
        if self.rounded:
            features_BTE = features_BTE.bfloat16().to(features_BTE.dtype)
        # All pads of an empty caption have the same features, so its first pad represents it where pads are masked.
        first_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) == 0
        return Text(features_BTE, mask_BT.bool() | first_T)

    def encode(self, captions: Sequence[str]) -> Text:
        ids_BT, mask_BT = self.tokenize(captions)
        device = self.model.device
        return cast(Text, self(ids_BT.to(device), mask_BT.to(device)))

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer in Hugging Face's format, which `TextEncoder(folder)` reads."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _unfreeze(model: Any, layers: int) -> None:
    model.requires_grad_(layers >= len(model.layers))
    if layers:
        model.norm.requires_grad_(True)
        for layer in model.layers[-layers:]:
            layer.requires_grad_(True)


def build_tiny(
    folder: str | Path,
    captions: Iterable[str],
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 1024,
    seed: int = 0,
) -> None:
    """Write a small random Qwen3, and a byte-level BPE trained on the captions, in Hugging Face's format."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_train_bpe(captions, vocab), pad_token=PAD, eos_token=PAD)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=hidden // heads,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_bpe(captions: Iterable[str], vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer

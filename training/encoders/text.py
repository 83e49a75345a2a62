"""Captions -> features: a Qwen3 of Hugging Face's format and its tokenizer, published or tiny.

Shapes: B captions, T tokens, E features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.encoders import load_model, quiet, unusable
from training.model.condition import Text

MOST_KNOWN = 100_000  # captions whose tokens are remembered
PAD = "<|endoftext|>"  # Qwen's own pad token


class TextEncoder(nn.Module):
    """The last hidden state, after the final norm, of captions cut or padded on the right to T tokens.

    `train_layers` counts the trainable layers from the last; with all of them, the token embeddings learn as well.
    `rounded` features have bf16's values, whatever type they are of.
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
        self._known: dict[str, list[int]] = {}  # a corpus says the same things over and over
        self.trains, self.rounded = train_layers > 0, rounded
        _unfreeze(self.model, train_layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, both [B, T]. No chat template; an empty caption has T pads and a mask of zeros."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._known))
        if new:
            if len(self._known) + len(new) > MOST_KNOWN:
                self._known.clear()
                new = list(dict.fromkeys(captions))
            ids = self.tokenizer(new, truncation=True, max_length=self.tokens)["input_ids"]
            self._known.update(zip(new, ids, strict=True))
        ids_BT = torch.full((len(captions), self.tokens), self.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, caption in enumerate(captions):
            found = self._known[caption]
            ids_BT[row, : len(found)] = torch.tensor(found, dtype=torch.long)
            mask_BT[row, : len(found)] = 1
        return ids_BT, mask_BT

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Text:
        # An empty caption is encoded without a mask: some attention kernels turn all-masked rows into something else.
        seen_BT = torch.where(mask_BT.any(1, keepdim=True), mask_BT, 1)
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            features_BTE = self.model(input_ids=ids_BT, attention_mask=seen_BT, use_cache=False).last_hidden_state
        if self.rounded:
            features_BTE = features_BTE.bfloat16().to(features_BTE.dtype)
        # All pads of an empty caption are alike, so its first one stands for it where pads are masked.
        first_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) == 0
        return Text(features_BTE, mask_BT.bool() | first_T)

    def encode(self, captions: Sequence[str]) -> Text:
        ids_BT, mask_BT = self.tokenize(captions)
        device = self.model.device
        text: Text = self(ids_BT.to(device), mask_BT.to(device))
        return text

    def save(self, folder: str | Path) -> None:
        """In Hugging Face's format, to be loaded by the same code."""
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
    """A small Qwen3 with random weights and a byte-level BPE learnt from the captions, as the hub would hold them."""
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

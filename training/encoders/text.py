"""Encodes captions with a Qwen3 in Hugging Face's format and its tokenizer, published or tiny.

Shapes: B captions, T tokens, E features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from training.encoders import load_model, quiet
from training.encoders.errors import unusable
from training.encoders.hub import folder_of
from training.encoders.packing import packed, padded, takes_packed
from training.model.condition import Text

MOST_CACHED = 100_000  # captions whose token ids are kept
PAD = "<|endoftext|>"  # Qwen's own pad token


class Tokens(NamedTuple):
    ids_BT: Tensor
    mask_BT: Tensor
    truncated_B: Tensor  # bool: captions that have more than T tokens


class TextEncoder(nn.Module):
    """The last hidden state, after the final norm, of captions truncated or right-padded to T tokens.

    The last `train_layers` layers are trained; if that is all of them, the token embeddings are as well. With
    `rounded`, features are rounded to bf16 and then cast back to the model's dtype.

    `needed` says what the network looks at, where no more than that is to be computed: with `masked`, captions without
    their pads, whose features are zeros then; with `published`, captions with them. Either way the empty caption is
    encoded once: in the encoder's life if that is frozen, else in a batch.
    """

    def __init__(
        self,
        source: str | Path,
        tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        train_layers: int = 0,
        rounded: bool = False,
        needed: Literal["masked", "published"] | None = None,
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        self.model = load_model(source, dtype)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder_of(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise unusable(source, error) from None
        self.tokens = tokens
        self._ids: dict[str, tuple[list[int], bool]] = {}  # token ids by caption, as they recur; and if they were cut
        self.needed: Literal["masked", "published"] | None = needed
        self._empty: Tensor | None = None  # features of a pad alone, where they never change
        if needed == "masked":
            takes_packed(self.model, source)
        self.trains, self.rounded = train_layers > 0, rounded
        _unfreeze(self.model, train_layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Without a chat template; an empty caption has T pads and a mask of zeros."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._ids))
        if new:
            if len(self._ids) + len(new) > MOST_CACHED:
                self._ids.clear()
                new = list(dict.fromkeys(captions))
            encoded = self.tokenizer(new, truncation=True, max_length=self.tokens)
            self._ids.update(zip(new, zip(encoded["input_ids"], self._cut(new, encoded), strict=True), strict=True))
        ids_BT = torch.full((len(captions), self.tokens), self.tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, caption in enumerate(captions):
            ids, _ = self._ids[caption]
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask_BT[row, : len(ids)] = 1
        return Tokens(ids_BT, mask_BT, torch.tensor([self._ids[caption][1] for caption in captions]))

    def _cut(self, captions: list[str], encoded: Any) -> list[bool]:
        if encoded.encodings is not None:
            return [bool(encoding.overflowing) for encoding in encoded.encodings]
        whole = self.tokenizer(captions, verbose=False)["input_ids"]  # a tokenizer written in Python keeps no rest
        return [len(ids) > self.tokens for ids in whole]

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, lengths: Sequence[int] | None = None) -> Text:
        """`lengths`: the tokens of each caption, where they are known without asking the device for its mask."""
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            if self.needed is None:
                features_BTE = self._all(ids_BT, mask_BT)
            else:
                features_BTE = self._only_needed(ids_BT, mask_BT, lengths or mask_BT.sum(1).tolist())
        if self.rounded:
            features_BTE = features_BTE.bfloat16().to(features_BTE.dtype)
        # All pads of an empty caption have the same features, so its first pad represents it where pads are masked.
        first_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) == 0
        return Text(features_BTE, mask_BT.bool() | first_T)

    def _all(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        # An empty caption is encoded without a mask: attention kernels disagree about rows that are masked throughout.
        attended_BT = torch.where(mask_BT.any(1, keepdim=True), mask_BT, 1)
        output = self.model(input_ids=ids_BT, attention_mask=attended_BT, use_cache=False)
        return cast(Tensor, output.last_hidden_state)

    def _only_needed(self, ids_BT: Tensor, mask_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        run = packed if self.needed == "masked" else padded
        pad = int(self.tokenizer.pad_token_id)
        features_BTE, empty_E = run(self.model, ids_BT, mask_BT, lengths, pad if self.trains else None)
        if empty_E is None:
            empty_E = self._frozen_empty(pad, ids_BT.device)
        return torch.where(mask_BT.any(1)[:, None, None], features_BTE, empty_E)

    def _frozen_empty(self, pad: int, device: torch.device) -> Tensor:
        if self._empty is None or self._empty.device != device or self._empty.dtype != self.model.dtype:
            alone = torch.full((1, 1), pad, device=device)
            self._empty = self.model(input_ids=alone, use_cache=False).last_hidden_state[0, 0]
        return self._empty

    def encode(self, captions: Sequence[str]) -> Text:
        ids_BT, mask_BT, _ = self.tokenize(captions)
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

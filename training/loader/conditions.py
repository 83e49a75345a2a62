"""What a batch carries for the network to draw from: tokens of captions, or labels. Each conditioner applies the drop.

Both are called for some samples of a batch: with their rows, and with what was drawn for their conditions.

Shapes: B images, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from infra.errors import DataError
from training.encoders.text import Tokens
from training.loader.reader import Reader

Tokenize = Callable[[Sequence[str]], Tokens]


class Conditioner(Protocol):
    shapes: dict[str, tuple[int, ...]]  # a field that only its batches have -> its shape for one sample

    def __call__(self, rows: Sequence[int], drop_B: Tensor, choice_B: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """The fields' values, and each sample's caption for people to read."""


class Captions:
    """Tokens of one of each row's captions; a dropped one is empty."""

    def __init__(self, reader: Reader, tokenize: Tokenize) -> None:
        self.reader, self.tokenize = reader, tokenize
        self._tokenizing = threading.Lock()  # a tokenizer is not made for several threads
        tokens = tokenize([""]).ids_BT.shape[1]
        self.shapes: dict[str, tuple[int, ...]] = {"ids_BT": (tokens,), "mask_BT": (tokens,)}

    def __call__(self, rows: Sequence[int], drop_B: Tensor, choice_B: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        captions = [
            "" if dropped else self.reader.caption(row, choice)
            for row, choice, dropped in zip(rows, choice_B.tolist(), drop_B.tolist(), strict=True)
        ]
        with self._tokenizing:
            tokens = self.tokenize(captions)
        return tokens._asdict(), captions


class Labels:
    """Each row's label; a dropped one is the number of classes, which stands for no class."""

    def __init__(self, reader: Reader, classes: int) -> None:
        if not reader.selection.labelled:
            raise DataError(
                "the snapshot has no labels", remedy="give it `labels`: the column that holds them, and their number"
            )
        self.reader, self.classes = reader, classes
        self.shapes: dict[str, tuple[int, ...]] = {"labels_B": ()}

    def __call__(self, rows: Sequence[int], drop_B: Tensor, choice_B: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        labels_B = torch.tensor([self.reader.selection.label(row) for row in rows])
        if (labels_B >= self.classes).any() or (labels_B < 0).any():
            raise DataError(
                f"the snapshot has labels up to {int(labels_B.max())}, and the network {self.classes} classes",
                remedy="let model.classes be the snapshot's labels.classes",
            )
        labels_B = torch.where(drop_B, self.classes, labels_B)
        return {"labels_B": labels_B}, [str(label) for label in labels_B.tolist()]

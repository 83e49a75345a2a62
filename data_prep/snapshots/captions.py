"""The caption mix: rules that say which of a sample's captions training draws and how often, for one shard at a time.

A caption belongs to the first rule that fits it; a caption that no rule fits is left out. A rule's weight is shared by
a sample's captions of that rule. Arrays whose names end in _C have an element for each caption of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Discriminator, Field, Tag, field_validator

from infra.config import Settings

Weight = Annotated[float, Field(ge=0, le=1e6)]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class CaptionRule(Settings):
    """Captions of this source, kind and length, where those are given; they share the weight among them."""

    weight: Weight
    source: str | None = None
    kind: str | None = None
    words: tuple[int, int | None] | None = Field(None, description="fewest and most, both included; null: no limit")

    @field_validator("words")
    @classmethod
    def _upwards(cls, span: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        if span and span[1] is not None and span[1] < span[0]:
            raise ValueError("the most words are fewer than the fewest")
        return span

    @property
    def label(self) -> str:
        """The rule in a snapshot's counts, such as `long of photos 5-20 words`."""
        low, high = self.words or (0, None)
        span = [f"{low}-{'' if high is None else high} words"] if self.words else []
        parts = [self.kind, self.source and f"of {self.source}", *span]
        return " ".join(part for part in parts if part) or "any"


# {kind: weight} stands for one rule for each kind.
Mix = Annotated[
    Annotated[dict[str, Weight], Tag("kinds")] | Annotated[list[CaptionRule], Tag("rules")],
    Discriminator(lambda value: "rules" if isinstance(value, list) else "kinds"),
]


class Mixed(NamedTuple):
    """Each row's captions, and their weights, which sum to 1."""

    texts: pa.ListArray
    weights: pa.ListArray
    kinds: set[str]  # of all captions of the shard, chosen or not
    rule_C: Ints  # the number of each chosen caption's rule
    rules: list[str]  # their labels

    def shares(self, times: Ints) -> dict[str, float]:
        """The sum of each rule's weights over all rows, where a row with a caption counts `times`."""
        length = pc.list_value_length(self.texts).to_numpy()
        times_C = np.repeat(times, length[length > 0])
        totals = np.bincount(self.rule_C, self.weights.flatten().to_numpy() * times_C, len(self.rules))
        return {rule: float(total) for rule, total in zip(self.rules, totals, strict=True) if total}


def caption_mix(captions: pa.ListArray, mix: Mapping[str, float] | list[CaptionRule], source: pa.Array) -> Mixed:
    """Choose and weigh the captions of each row by the rules; no mix means that all kinds weigh the same."""
    rows = len(captions)
    row_C = pc.list_parent_indices(captions).to_numpy()
    flat = captions.flatten()
    kinds = flat.field("kind").dictionary_encode()
    names = kinds.dictionary.to_pylist()
    rules = rules_of(mix) if mix else [CaptionRule(kind=name, weight=1) for name in names]
    rule_C = _rule_of_each(rules, kinds, flat.field("text"), source.take(pa.array(row_C)))
    weight_C = np.array([*(rule.weight for rule in rules), 0.0])[rule_C]
    _, group_C, size = np.unique(row_C * (len(rules) + 1) + rule_C, return_inverse=True, return_counts=True)
    weight_C = weight_C / size[group_C]
    total = np.bincount(row_C, weight_C, rows)
    kept = np.flatnonzero(weight_C > 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(row_C[kept], minlength=rows))]), pa.int32())
    share = pa.array((weight_C[kept] / total[row_C[kept]]).astype(np.float32))
    texts = flat.field("text").take(pa.array(kept))
    return Mixed(
        pa.ListArray.from_arrays(offsets, texts),
        pa.ListArray.from_arrays(offsets, share),
        set(names),
        rule_C[kept],
        [rule.label for rule in rules],
    )


def rules_of(mix: Mapping[str, float] | list[CaptionRule]) -> list[CaptionRule]:
    return mix if isinstance(mix, list) else [CaptionRule(kind=kind, weight=weight) for kind, weight in mix.items()]


def _rule_of_each(rules: list[CaptionRule], kinds: pa.DictionaryArray, texts: pa.Array, sources: pa.Array) -> Ints:
    """The number of the first rule that fits each caption, len(rules) where none does."""
    rule_C = np.full(len(texts), len(rules))
    words = None
    for number, rule in reversed(list(enumerate(rules))):
        fits = np.ones(len(texts), bool)
        if rule.kind is not None:
            fits &= _is(kinds, rule.kind)
        if rule.source is not None:
            fits &= _is(sources, rule.source)
        if rule.words is not None:
            words = word_counts(texts) if words is None else words
            low, high = rule.words
            fits &= words >= low
            if high is not None:
                fits &= words <= high
        rule_C[fits] = number
    return rule_C


def word_counts(texts: pa.StringArray) -> Ints:
    """The number of words in each text, separated by white space: Chinese or Japanese without spaces is one word."""
    if not len(texts):
        return np.zeros(0, np.int64)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(data or b"", np.uint8) > ord(" ")  # also every byte of a non-ASCII character
    begins = letters.copy()
    begins[1:] &= ~letters[:-1]
    starts = ends[:-1][(ends[:-1] < ends[1:])]
    begins[starts] = letters[starts]
    counts: Ints = np.diff(np.searchsorted(np.flatnonzero(begins), ends))
    return counts


def _is(values: pa.DictionaryArray, name: str) -> Bools:
    names = values.dictionary.to_pylist()
    same: Bools = values.indices.to_numpy() == (names.index(name) if name in names else -1)
    return same


def appended(captions: pa.ListArray, more: pa.ListArray) -> pa.ListArray:
    """Each row's captions, followed by its captions in `more`."""
    row_C = np.concatenate([pc.list_parent_indices(lists).to_numpy() for lists in (captions, more)])
    flat = pa.concat_arrays([captions.flatten(), more.flatten().cast(captions.type.value_type)])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_C, minlength=len(captions)))])
    order = pa.array(np.argsort(row_C, kind="stable"))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat.take(order))

"""Rows of a snapshot that stand for all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def spread(rows: int) -> Iterator[int]:
    """All numbers below `rows`, ordered so that any first few of them lie far apart: 0, 8, 4, 2, 6, 10, 1, ..."""
    step = 1 << max(rows - 1, 0).bit_length()
    if rows:
        yield 0
    while step > 1:
        yield from range(step // 2, rows, step)
        step //= 2


def likeliest_caption(row: Mapping[str, Any]) -> str:
    weights = row["caption_weights"]
    return str(row["captions"][max(range(len(weights)), key=weights.__getitem__, default=0)])

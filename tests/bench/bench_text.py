"""Encoding captions: all padded to 128 tokens, sorted into groups that are cut to their longest, and packed.

    python -m tests.bench.bench_text [--batch 32] [--rounds 5]

A random Qwen3 of 4 layers, 256 wide, reads pieces of README.md of 10 to 100 words, a tenth of them dropped (empty).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.sides import compare, show
from training.encoders.text import TextEncoder, build_tiny

TOKENS = 128
GROUPS = 4
README = Path(__file__).parents[2] / "README.md"


def captions(count: int) -> list[str]:
    words, rng = README.read_text("utf-8").split(), random.Random(0)
    pieces = []
    for number in range(count):
        start, length = rng.randrange(len(words) - 100), rng.randint(10, 100)
        pieces.append("" if number % 10 == 9 else " ".join(words[start : start + length]))
    return pieces


@torch.no_grad()
def by_length(encoder: TextEncoder, ids_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
    """The other way to leave pads out: groups of similar lengths, each cut to its longest."""
    lengths = mask_BT.sum(1)
    groups = lengths.argsort().chunk(GROUPS)
    longest = [max(1, int(lengths[rows].max())) for rows in groups]
    return [
        encoder(ids_BT[rows, :width], mask_BT[rows, :width]).features_RTE
        for rows, width in zip(groups, longest, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    texts = captions(given.batch)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, texts, hidden=256, layers=4, heads=4, vocab=2048)
        padded, packed = TextEncoder(folder, TOKENS), TextEncoder(folder, TOKENS, needed="masked")
    ids_BT, mask_BT, cut_B = padded.tokenize(texts)
    lengths = mask_BT.sum(1).tolist()
    share = sum(lengths) / mask_BT.numel()
    print(
        f"{len(texts)} captions: {share:.2f} of their {TOKENS} tokens are no pads, {int(cut_B.sum())} captions are cut"
    )
    sides = {
        "padded": lambda: padded(ids_BT, mask_BT),
        f"{GROUPS} groups by length": lambda: by_length(padded, ids_BT, mask_BT),
        "packed": lambda: packed(ids_BT, mask_BT, lengths),
    }
    show(compare(sides, given.rounds), against=("padded",))


if __name__ == "__main__":
    main()

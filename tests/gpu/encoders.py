"""Encoders of random weights, in the format that published ones have."""

from __future__ import annotations

from pathlib import Path

import torch

from training.encoders import text, vision

_THINGS = (
    "a red circle",
    "two green triangles",
    "a striped cat",
    "a glass of water",
    "an old lighthouse",
    "a blue bus",
)
CAPTIONS = [f"a photo of {one} to the left of {other}" for one in _THINGS for other in _THINGS]


def write(folder: Path, *, tiny: bool, device: str) -> None:
    """Sizes of Qwen3-1.7B and DINOv2-B, made on the device, as a CPU takes a minute for so many random numbers.

    The tokenizer has 300 tokens, so the table of embeddings is smaller than Qwen's; looking up costs no product.
    """
    with torch.device(device):
        if tiny:
            text.build_tiny(folder / "text", CAPTIONS, hidden=32, layers=1, heads=2, vocab=300)
            vision.build_tiny(folder / "vision", hidden=16, layers=1, heads=2, patch_size=8, image_size=16)
        else:
            text.build_tiny(folder / "text", CAPTIONS, hidden=2048, layers=28, heads=16, vocab=300)
            vision.build_tiny(folder / "vision", hidden=768, layers=12, heads=12, patch_size=14, image_size=518)

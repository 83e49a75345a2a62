"""Checkpoint folders of networks small enough for a test, whose pictures nevertheless depend on what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from training import model as models
from training.encoders import text

NAMES = ["tench, Tinca tinca", "goldfish", "crane", "hen", "crane, machine"]
SMALL = {"image_size": 16, "patch_size": 4, "hidden": 32, "heads": 2, "blocks": 2, "field_blocks": 1}
SMALL |= {"field_channels": 8}


def write_text(folder: Path, *, extra: dict[str, Any] | None = None, **changes: Any) -> Path:
    config = models.ModelConfig(**SMALL | {"text_blocks": 1, "text_dim": 32, "text_tokens": 12} | changes)
    text.build_tiny(folder / "text", ["a red circle", "two blue squares"] * 9, hidden=32, layers=1, heads=2, vocab=300)
    return _write(folder, config, {"text_encoder": "text"} | (extra or {}))


def write_class(folder: Path, *, extra: dict[str, Any] | None = None, **changes: Any) -> Path:
    return _write(folder, models.ModelConfig(**SMALL | {"task": "class", "classes": 5} | changes), extra or {})


def _write(folder: Path, config: models.ModelConfig, extra: dict[str, Any]) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.PixNerd(config)
        drawn_by = net.field if net.head is None else net.head
        assert drawn_by is not None
        # The last layer starts at zero, where all pictures are their noise, and labels are almost alike.
        torch.nn.init.normal_(drawn_by.out.weight, std=0.2)
        if net.label is not None:
            torch.nn.init.normal_(net.label.weight, std=2)
    models.save(folder, net, extra)
    return folder

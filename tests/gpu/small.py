"""A network of some thousand weights, whose sizes the kernels nevertheless take."""

from __future__ import annotations

from typing import Any

MODEL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden": 32,
    "heads": 2,
    "blocks": 2,
    "text_blocks": 1,
    "text_dim": 32,
    "text_tokens": 16,
    "field_blocks": 1,
    "field_channels": 16,
}

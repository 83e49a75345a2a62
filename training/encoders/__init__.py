"""Pretrained encoders, loaded with transformers, which is slow to import and so is imported on first use only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from training.encoders.errors import unusable
from training.encoders.hub import folder_of


def load_model(source: str | Path, dtype: torch.dtype) -> Any:
    """A model in Hugging Face's format from a folder or the hub: only safetensors, and no code that comes with it."""
    from transformers import AutoModel

    quiet()
    folder = folder_of(source)
    try:
        return AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unusable(source, error) from None


def quiet() -> None:
    """Turn off transformers' progress bars, which would fill a training log."""
    from transformers.utils import logging

    logging.disable_progress_bar()

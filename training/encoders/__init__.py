"""Pretrained encoders, loaded with transformers, which is slow to import and so is imported on first use only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from infra.errors import CheckpointError

FORMAT = "name a folder or hub model of transformers' format: config.json, model.safetensors, tokenizer.json"  # remedy


def load_model(source: str | Path, dtype: torch.dtype) -> Any:
    """A model in Hugging Face's format from a folder or the hub: only safetensors, and no code that comes with it."""
    from transformers import AutoModel

    quiet()
    try:
        return AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unusable(source, error) from None


def quiet() -> None:
    """Turn off transformers' progress bars, which would fill a training log."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def unusable(source: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"no encoder can be loaded from {source} ({(str(error).strip() or type(error).__name__).splitlines()[0]})",
        remedy=FORMAT,
    )

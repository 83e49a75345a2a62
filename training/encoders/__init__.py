"""Pretrained encoders, through transformers and nothing else. It is slow to import, so that happens on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from infra.errors import CheckpointError


def load_model(source: str | Path, dtype: torch.dtype) -> Any:
    """A model of Hugging Face's format, from a local folder or the hub; only safetensors, no code of its own."""
    from transformers import AutoModel

    quiet()
    try:
        return AutoModel.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unusable(source, error) from None


def quiet() -> None:
    """Bars for files that load in a moment are noise in a training log."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def unusable(source: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"no encoder can be loaded from {source} ({(str(error).strip() or type(error).__name__).splitlines()[0]})",
        remedy="name a folder or hub model of transformers' format: config.json, model.safetensors, tokenizer.json",
    )

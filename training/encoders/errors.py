"""What is said of an encoder that cannot be had."""

from __future__ import annotations

from pathlib import Path

from infra.errors import CheckpointError

FORMAT = "name a folder or hub model of transformers' format: config.json, model.safetensors, tokenizer.json"  # remedy


def unusable(source: str | Path, error: Exception) -> CheckpointError:
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return CheckpointError(f"no encoder can be loaded from {source} ({why})", remedy=FORMAT)

"""The network, and the folder that holds one: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.config import parse
from infra.errors import CheckpointError, SettingsError
from training.model.embed import Condition, Text
from training.model.pixnerd import PixNerd
from training.model.presets import PRESETS, ModelConfig, preset

__all__ = ["PRESETS", "Condition", "ModelConfig", "PixNerd", "Text", "load", "preset", "read_config", "save"]

SCHEMA = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(
    folder: str | Path,
    net: PixNerd,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a network: it is there whole or not at all. `weights` (an EMA's, say) stand in for the net's own.

    `extra` is whatever plain JSON tells where the network comes from; `read_config` gives it back.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} holds a checkpoint already", remedy="name a new folder, or remove this one")
    state = net.state_dict() if weights is None else dict(weights)
    _refuse(_differences(net.state_dict(), {name: tuple(t.shape) for name, t in state.items()}), "the weights to save")
    config = {"schema_version": SCHEMA, "model": net.config.model_dump(mode="json"), "extra": dict(extra or {})}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
        unfinished = Path(name)
        save_file({name: t.detach().contiguous().cpu() for name, t in state.items()}, unfinished / WEIGHTS)
        (unfinished / CONFIG).write_text(text, encoding="utf-8")
        for file in (WEIGHTS, CONFIG):  # the settings come last: without them the folder is no checkpoint
            _sync(unfinished / file)
            (unfinished / file).replace(folder / file)


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> PixNerd:
    """The network of a folder, in the dtypes that it was saved in; ready to be called as `net(x, t, condition)`."""
    folder = Path(folder)
    config, _ = read_config(folder)
    with torch.device("meta"):
        net = PixNerd(config)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _refuse(_differences(net.state_dict(), shapes), str(path))
        state = load_file(path, device=str(device))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {WEIGHTS}", remedy="name the folder of a whole checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})", remedy="fetch or export the checkpoint again") from None
    net.load_state_dict(state, assign=True)
    return net


def read_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The settings of a saved network and the `extra` that was saved with it; no tensor is read."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, model, extra = data["schema_version"], data["model"], data["extra"]
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is no checkpoint: it holds no {CONFIG}", remedy=f"name a folder with {CONFIG} and {WEIGHTS}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error})", remedy="fetch or export the checkpoint again"
        ) from None
    if version != SCHEMA:
        raise CheckpointError(f"{path} has schema {version}, this is {SCHEMA}", remedy="use the pixnerd that wrote it")
    try:
        return parse(ModelConfig, model), extra
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from None


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    for name, tensor in expected.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != tuple(tensor.shape):
            yield f"{name} is {found[name]} instead of {tuple(tensor.shape)}"
    yield from (f"{name} is left over" for name in found if name not in expected)


def _refuse(differences: Iterable[str], where: str) -> None:
    problems = list(differences)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{where} do not fit the settings: {'; '.join(problems[:8])}{more}",
            remedy="use the config.json that belongs to these weights",
        )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

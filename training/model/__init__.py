"""The network, and the checkpoint folder that stores one: `config.json`, `model.safetensors`, and their hashes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.config import parse
from infra.errors import CheckpointError, SettingsError
from infra.files import appearing, sha256_of
from training.model.checksums import SUMS, check_files, sums_text, write_sums
from training.model.condition import Text
from training.model.fit import Shape, differences, refuse, shapes
from training.model.pixnerd import PixNerd
from training.model.presets import PRESETS, ModelConfig, preset

# Names of the modules below that are used as `training.model.<name>`.
__all__ = ["PRESETS", "SUMS", "ModelConfig", "PixNerd", "Text", "check_files", "preset", "write_sums"]

SCHEMA = 1
CONFIG, WEIGHTS, HEAD = "config.json", "model.safetensors", "repa.safetensors"
_REMEDY = "use the config.json that belongs to these weights"


def save(
    folder: str | Path,
    net: PixNerd,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder, completely or not at all. `weights` (such as an EMA's) replace the network's own.

    `extra` is any JSON object to keep with the network; `read_config` returns it.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} holds a checkpoint already", remedy="name a new folder, or remove this one")
    state = net.state_dict() if weights is None else dict(weights)
    refuse(differences(shapes(net.state_dict()), shapes(state)), "the weights to save do not fit the settings", _REMEDY)
    config = {"schema_version": SCHEMA, "model": _told(net.config), "extra": dict(extra or {})}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    # The files appear from the innermost out, so config.json comes last: without it the folder is no checkpoint.
    with (
        appearing(folder / CONFIG) as config_file,
        appearing(folder / WEIGHTS) as weights_file,
        appearing(folder / SUMS) as sums_file,
    ):
        config_file.write_text(text, encoding="utf-8")
        save_file({name: t.detach().contiguous().cpu() for name, t in state.items()}, weights_file)
        # safetensors makes the file readable by its owner only; it gets the permissions of config.json.
        weights_file.chmod(config_file.stat().st_mode)
        sums_file.write_text(sums_text({file.name: sha256_of(file) for file in (config_file, weights_file)}))


def _told(config: ModelConfig) -> dict[str, Any]:
    """The settings as they are written. One that came later is left out at its default, as in older versions' files."""
    settings = config.model_dump(mode="json")
    return {name: value for name, value in settings.items() if name != "noise_scale" or value != 1}


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> PixNerd:
    """The network of a checkpoint folder, in the dtypes that it was saved in."""
    folder = Path(folder)
    config, _ = read_config(folder)
    net = outline(config)
    read_header(folder, config)
    check_files(folder, WEIGHTS)
    with _read_errors(folder / WEIGHTS):
        state = load_file(folder / WEIGHTS, device=str(device))
    net.load_state_dict(state, assign=True)
    return net


def outline(config: ModelConfig) -> PixNerd:
    """The network on the meta device: names and shapes without memory for weights."""
    with torch.device("meta"):
        return PixNerd(config)


def read_header(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """Shapes and dtypes of a folder's weights, checked against its settings; no tensor is read."""
    stored = header(folder / WEIGHTS)
    problems = differences(shapes(outline(config).state_dict()), {name: s.shape for name, s in stored.items()})
    refuse(problems, f"{folder / WEIGHTS} does not fit the settings", _REMEDY)
    return stored


class Stored(NamedTuple):
    shape: Shape
    dtype: str


def header(path: Path) -> dict[str, Stored]:
    """Shapes and dtypes of a safetensors file's tensors, by name; no tensor is read."""
    with _read_errors(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: Stored(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Errors of reading a file as `CheckpointError`s."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} holds no {path.name}", remedy="name the folder of a whole checkpoint"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})", remedy="fetch or export the checkpoint again") from None


def read_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The settings of a saved network and the `extra` that was saved with it; no tensor is read."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, model, extra = data["schema_version"], data["model"], data["extra"]
        if not isinstance(extra, dict):
            raise TypeError("extra is no mapping")
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
        parsed = parse(ModelConfig, model)
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from None
    check_files(Path(folder), CONFIG)
    return parsed, extra

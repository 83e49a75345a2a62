"""Published checkpoints in and out: files of the reference's layout <-> checkpoint folders.

Each tensor keeps its type, and a file that went in comes out bit for bit. What does not fit is refused before anything
is written, and what is written appears whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import CheckpointError, SettingsError
from training import model as models
from training.model import reference
from training.model.fit import refuse
from training.model.presets import ModelConfig
from training.model.published import HEAD, PREFIXES, REMEDY, Network, head_differences, naming, plain, read

TEXT_ENCODERS = {2048: "Qwen/Qwen3-1.7B"}  # by the width of their features


def import_file(
    path: Path,
    folder: Path,
    *,
    network: Network | None = None,
    trained_size: int | None = None,
    text_encoder: str | None = None,
) -> dict[str, Any]:
    """A published file as a checkpoint folder, which appears whole or not at all; returns what its `extra` says."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SettingsError(f"{folder} is there already, and is not an empty folder", remedy="name a new one")
    published = read(path)
    chosen = published.choose(network)
    config = _trained_at(published.config(chosen), trained_size)
    encoder = _text_encoder(config, text_encoder)
    prefix = PREFIXES.get(chosen, "")
    tensors, head = published.networks[chosen], published.head
    with naming(path):
        refuse(_not_finite(tensors, prefix) + _not_finite(head, HEAD), "not every weight is a number", REMEDY)
        net = models.outline(config)
        weights = reference.from_reference(tensors, config, net.state_dict(), prefix)
    left = {PREFIXES[name]: len(others) for name, others in published.networks.items() if name != chosen}
    extra: dict[str, Any] = {"text_encoder": encoder} if encoder else {}
    extra["provenance"] = {
        "imported_from": path.name,
        "sha256": _sha256(path),
        "network": chosen,
        "dtypes": dict(Counter(plain(tensor.dtype) for tensor in tensors.values())),
        "skipped": [f"{name} ({count} tensors)" for name, count in {**left, **published.skipped}.items()],
        "pixnerd": importlib.metadata.version("pixnerd"),
    }
    with _appears_whole(folder) as unfinished:
        models.save(unfinished, net, extra, _unshared(weights))
        if head:
            save_file({name: tensor.contiguous() for name, tensor in _unshared(head).items()}, unfinished / models.HEAD)
            _sync(unfinished / models.HEAD)
    return extra


def _trained_at(config: ModelConfig, size: int | None) -> ModelConfig:
    if size is not None and (size < 1 or size % config.patch_size):
        raise SettingsError(
            f"--trained-size {size} is no multiple of the patch size {config.patch_size}",
            remedy="give the side of the images that it was trained on",
        )
    return config.model_copy(update={"image_size": size})


def _text_encoder(config: ModelConfig, given: str | None) -> str | None:
    """A published encoder's name, or the absolute path of a folder with one."""
    if config.task == "class":
        if given is not None:
            raise SettingsError("this network draws from labels and reads no text", remedy="leave --text-encoder out")
        return None
    if given is None:
        return TEXT_ENCODERS.get(config.text_dim)
    folder = Path(given)
    if not folder.is_dir():
        if given == "text" or given.startswith((".", "/", "~")) or given.count("/") > 1:
            raise SettingsError(f"there is no folder {given}", remedy="name a text encoder's folder or published name")
        return given
    try:
        width = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{folder} is no text encoder ({type(error).__name__}: {error})",
            remedy="name a folder whose config.json tells hidden_size",
        ) from None
    if width != config.text_dim:
        raise SettingsError(
            f"the text encoder {folder} makes features of {width}, the network needs {config.text_dim}",
            remedy="name the encoder that it was trained with",
        )
    return str(folder.resolve())


def _not_finite(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [
        f"{prefix}{name} holds a NaN or an infinity"
        for name, tensor in tensors.items()
        if not torch.stack(tensor.aminmax()).isfinite().all()
    ]


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory in the file have some of their own: they are weights of their own in a checkpoint."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _appears_whole(path: Path) -> Iterator[Path]:
    """What is written at the path given takes its real place in one step, and only if nothing stands there."""
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as holder:
            unfinished = Path(holder) / path.name
            yield unfinished
            if path.is_file():
                raise FileExistsError("it is there by now")
            unfinished.rename(path)  # a folder onto an empty one at most
    except (OSError, SafetensorError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"{path} cannot be written ({error})", remedy="make room there, or name another place"
        ) from None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------ export


def export_folder(folder: Path, file: Path, *, network: Literal["ema", "raw", "both"] | None = None) -> dict[str, Any]:
    """A checkpoint folder as a file of the published layout; returns what was written.

    The network goes under the prefix that it was imported from. One of another origin goes under the mean's
    (`ema_denoiser.`): that is what a training run publishes, and what the published code draws with.
    """
    if file.exists():
        raise SettingsError(f"{file} is there already", remedy="name a new file")
    if file.suffix == ".safetensors":
        raise SettingsError("what is written is a PyTorch file", remedy="let its name end in .ckpt or .pt")
    config, extra = models.read_config(folder)
    reference.refuse_other_than_published(config)
    weights = models.load(folder).state_dict()
    theirs = {name: _own(tensor) for name, tensor in reference.to_reference(weights, config).items()}
    if network is None:
        network = "raw" if provenance(extra).get("network") == "raw" else "ema"
    prefixes = [PREFIXES[name] for name in (("raw", "ema") if network == "both" else (network,))]
    state = {f"{prefix}{name}": tensor for prefix in prefixes for name, tensor in theirs.items()}
    head = _own_head(folder, config)
    state |= {f"{HEAD}{name}": tensor for name, tensor in head.items()}
    with _appears_whole(file) as unfinished:
        torch.save({"state_dict": state}, unfinished)
        _sync(unfinished)
    return {
        "file": str(file),
        "prefixes": prefixes + ([HEAD] if head else []),
        "tensors": len(state),
        "dtypes": dict(Counter(plain(tensor.dtype) for tensor in state.values())),
        "left_out": ["text"] if extra.get("text_encoder") == "text" else [],
    }


def provenance(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    found = extra.get("provenance")
    return found if isinstance(found, dict) else {}


def _own(tensor: Tensor) -> Tensor:
    """A part of a larger tensor would take the whole of it along into the file."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _own_head(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    path = folder / models.HEAD
    if not path.exists():
        return {}
    found = {name: stored.shape for name, stored in models.header(path).items()}
    refuse(
        head_differences(found, config.hidden, ""),
        f"{path} has no published layout",
        "take the file out of the folder to export the network alone",
    )
    head: dict[str, Tensor] = load_file(path)
    return head

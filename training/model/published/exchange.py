"""Imports published PixNerd files (the reference's layout) as checkpoint folders, and exports folders as such files.

Each tensor keeps its dtype, and an import followed by an export gives it back bit for bit. What does not fit is refused
before anything is written, and what is written appears complete or not at all.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra.errors import CheckpointError, SettingsError
from infra.files import appearing, sha256_of
from training import model as models
from training.model.fit import REMEDY, plain, refuse
from training.model.presets import ModelConfig
from training.model.published import reference
from training.model.published.file import HEAD, PREFIXES, Network, Published, check_sums, head_differences, naming, read

TEXT_ENCODERS = {2048: "Qwen/Qwen3-1.7B"}  # by the width of their features


def import_file(
    path: Path,
    folder: Path,
    *,
    network: Network | None = None,
    trained_size: int | None = None,
    text_encoder: str | None = None,
) -> dict[str, Any]:
    """Import a published file as a checkpoint folder; returns the folder's `extra`."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SettingsError(f"{folder} is there already, and is not an empty folder", remedy="name a new one")
    published = read(path)
    chosen = published.choose(network)
    config = _trained_at(published.config(chosen), trained_size)
    encoder = _text_encoder(config, text_encoder)
    prefix = PREFIXES.get(chosen, "")
    tensors, head = published.networks[chosen], published.head
    with naming(path):
        check_sums(path)
        refuse(_not_finite(tensors, prefix) + _not_finite(head, HEAD), "not every weight is a number", REMEDY)
        net = models.outline(config)
        weights = reference.from_reference(tensors, config, net.state_dict(), prefix)
    extra: dict[str, Any] = {"text_encoder": encoder} if encoder else {}
    extra["provenance"] = {
        "imported_from": path.name,
        "sha256": sha256_of(path),
        "network": chosen,
        "dtypes": dict(Counter(plain(tensor.dtype) for tensor in tensors.values())),
        "skipped": _skipped(published, chosen),
        "pixnerd": importlib.metadata.version("pixnerd"),
    }
    with _written(folder) as unfinished:
        models.save(unfinished, net, extra, _unshared(weights))
        if head:
            save_file({name: tensor.contiguous() for name, tensor in _unshared(head).items()}, unfinished / models.HEAD)
            models.write_sums(unfinished)
    return extra


def _skipped(published: Published, chosen: str) -> list[str]:
    """What of the file was not imported: the other networks, and tensors by prefix."""
    networks = []
    for name in published.networks.keys() - {chosen}:
        try:
            published.config(name)
            whole = ""
        except CheckpointError:
            whole = ", which are no whole network"
        networks.append(f"{PREFIXES[name]} ({len(published.networks[name])} tensors{whole})")
    return networks + [f"{name} ({count} tensors)" for name, count in published.skipped.items()]


def _trained_at(config: ModelConfig, size: int | None) -> ModelConfig:
    if size is not None and (size < 1 or size % config.patch_size):
        raise SettingsError(
            f"--trained-size {size} is no multiple of the patch size {config.patch_size}",
            remedy="give the side of the images that it was trained on",
        )
    return config.model_copy(update={"image_size": size})


def _text_encoder(config: ModelConfig, source: str | None) -> str | None:
    """A published encoder's name such as Qwen/Qwen3-1.7B, or the absolute path of a folder with one."""
    if config.task == "class":
        if source is not None:
            raise SettingsError("this network draws from labels and reads no text", remedy="leave --text-encoder out")
        return None
    if source is None:
        return TEXT_ENCODERS.get(config.text_dim)
    folder = Path(source)
    if not folder.is_dir():
        if source == "text" or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise SettingsError(f"there is no folder {source}", remedy="name a text encoder's folder or published name")
        return source
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
    """The tensors, with those copied that share memory with an earlier one: safetensors saves no shared memory."""
    unshared: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if address in addresses else tensor
        addresses.add(address)
    return unshared


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` at the end unless something else has appeared there."""
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path, replace=False) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error})", remedy="make room there, or name another place"
        ) from None


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    try:
        torch.save({"state_dict": state}, path)
    except RuntimeError as error:  # PyTorch reports a full disk as one
        raise OSError(str(error)) from None


# ------------------------------------------------------------------------------------------------ export


def export_folder(folder: Path, file: Path, *, network: Literal["ema", "raw", "both"] | None = None) -> dict[str, Any]:
    """Export a checkpoint folder as a file of the published layout; returns a summary of it.

    `network` defaults to the one that was imported. For a folder of another origin that is the EMA (`ema_denoiser.`),
    which training runs publish and the published code samples with.
    """
    if file.exists():
        raise SettingsError(f"{file} is there already", remedy="name a new file")
    if file.suffix == ".safetensors":
        raise SettingsError("what is written is a PyTorch file", remedy="let its name end in .ckpt or .pt")
    config, extra = models.read_config(folder)
    reference.refuse_other_than_published(config)
    weights = models.load(folder).state_dict()
    tensors = {name: _compact(tensor) for name, tensor in reference.to_reference(weights, config).items()}
    if network is None:
        network = "raw" if provenance(extra).get("network") == "raw" else "ema"
    prefixes = [PREFIXES[name] for name in (("raw", "ema") if network == "both" else (network,))]
    state = {f"{prefix}{name}": tensor for prefix in prefixes for name, tensor in tensors.items()}
    head = _repa_head(folder, config)
    state |= {f"{HEAD}{name}": tensor for name, tensor in head.items()}
    with _written(file) as unfinished:
        _save(state, unfinished)
    return {
        "file": str(file),
        "prefixes": prefixes + ([HEAD] if head else []),
        "tensors": len(state),
        "dtypes": dict(Counter(plain(tensor.dtype) for tensor in state.values())),
        "left_out": ["text"] if extra.get("text_encoder") == "text" else [],
    }


def provenance(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    value = extra.get("provenance")
    return value if isinstance(value, dict) else {}


def _compact(tensor: Tensor) -> Tensor:
    """A view of a larger tensor as a tensor of its own; `torch.save` would write the larger one."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _repa_head(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    path = folder / models.HEAD
    if not path.exists():
        return {}
    head_shapes = {name: stored.shape for name, stored in models.header(path).items()}
    refuse(
        head_differences(head_shapes, config.hidden, ""),
        f"{path} has no published layout",
        "take the file out of the folder to export the network alone",
    )
    models.check_files(folder, models.HEAD)
    return cast(dict[str, Tensor], load_file(path))

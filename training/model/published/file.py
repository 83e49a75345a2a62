"""Reads a published checkpoint file: what it holds is recognised by names and shapes, without reading the weights.

    denoiser.                   the network as it was trained
    ema_denoiser.               the exponential moving average of its weights
    diffusion_trainer.proj.0.   the head of representation alignment
    conditioner., vae., diffusion_trainer.encoder.   frozen encoders, which are skipped

Anything beside the file's `state_dict` (optimizer, epoch, callbacks) is ignored. A file is treated as hostile: nothing
in it is executed, and tensors that claim to be larger than the file are refused.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import CheckpointError, SettingsError
from training import model as models
from training.model.fit import REMEDY, Shape, differences, plain, refuse, shapes
from training.model.presets import ModelConfig
from training.model.published import reference
from training.model.repa_head import RepaHead

Network = Literal["ema", "raw"]
PREFIXES: dict[str, str] = {"ema": "ema_denoiser.", "raw": "denoiser."}
UNNAMED = "unnamed"  # the network of a file whose names have no prefix
HEAD = "diffusion_trainer.proj.0."
FROZEN = ("conditioner.", "vae.", "diffusion_trainer.encoder.")

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LONGEST_NAME = 200


@dataclass
class Published:
    """A file's tensors, memory-mapped and not read yet; their names are without the network's prefix."""

    path: Path
    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)  # prefix -> tensors

    def choose(self, network: Network | None) -> str:
        if network is None and list(self.networks) == [UNNAMED]:
            return UNNAMED
        wanted = network or "ema"
        if wanted in self.networks:
            return wanted
        if UNNAMED in self.networks:
            raise SettingsError(
                f"{self.path} does not say which network it holds: its names have no prefix",
                remedy="leave --network out",
            )
        raise SettingsError(
            f"{self.path} holds no {wanted} network ({PREFIXES[wanted]})",
            remedy=f"name one that is there with --network: {', '.join(self.networks)}",
        )

    def config(self, network: str) -> ModelConfig:
        """The settings of a network; the shape of each of its tensors is checked against them."""
        tensors, prefix = self.networks[network], PREFIXES.get(network, "")
        with naming(self.path):
            config = reference.find_config(shapes(tensors), prefix)
            reference.check_layout(shapes(tensors), config, shapes(models.outline(config).state_dict()), prefix)
            refuse(head_differences(shapes(self.head), config.hidden), "this is not the published layout", REMEDY)
        return config


def read(path: Path) -> Published:
    """Read a file's names and shapes, and check all that can be checked without reading the weights."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", remedy="check the path")
    with naming(path):
        state = _safetensors(path) if path.suffix == ".safetensors" else _state_dict(_torch_file(path))
        published = _by_prefix(path, state)
        size = path.stat().st_size
        for name, tensors in {**published.networks, "REPA head": published.head}.items():
            claimed = sum(tensor.nbytes for tensor in tensors.values())
            if claimed > size:
                raise CheckpointError(
                    f"the tensors of {name} claim {claimed:,} bytes, the whole file has {size:,}", remedy=REMEDY
                )
    return published


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's path in front of errors, which name tensors only."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from None


def _safetensors(path: Path) -> dict[Any, Any]:
    try:
        return cast(dict[Any, Any], load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the file is damaged ({error})", remedy="fetch it again") from None


# What reading a damaged or forged file can raise before weights_only refuses it.
_BROKEN: tuple[type[Exception], ...] = (pickle.PickleError, struct.error, zipfile.BadZipFile, MemoryError, OSError)
_BROKEN += (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)


def _torch_file(path: Path) -> object:
    sizes: Counter[int] = Counter()

    def on_cpu(storage: Any, location: str) -> Any:
        if storage.nbytes():
            sizes[storage.nbytes()] += 1
        return storage

    try:
        records = _records(path)
        with warnings.catch_warnings(action="ignore"):
            data = torch.load(path, map_location=on_cpu, mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_only_weights(error) from None
    except _BROKEN as error:
        text = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"this is no whole PyTorch file ({_printable(text)})",
            remedy="fetch it again; a file of before PyTorch 1.6 must be saved again",
        ) from None
    if sizes - records:
        raise CheckpointError("the file is damaged: tensors are longer than their records", remedy="fetch it again")
    return data


def check_sums(path: Path) -> None:
    """Check every record of a PyTorch file against its checksum, which reads the whole file."""
    if path.suffix == ".safetensors":  # it has no checksums
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _BROKEN as error:
        damaged = f"a record ({_printable(str(error))[:_LONGEST_NAME]})"
    if damaged is not None:
        raise CheckpointError(
            f"the file is damaged: {_printable(damaged)} is not what was saved", remedy="fetch it again"
        )


def _records(path: Path) -> Counter[int]:
    """How many records of a PyTorch file have each size; the file is a zip archive without compression."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("it is compressed")
        for record in records:
            if record.filename.endswith(".pkl"):
                _check_calls(archive.read(record))
    return Counter(record.file_size for record in records)


# All functions that a pickle of tensors, numbers and strings calls. weights_only allows others too, with which a small
# file can fill any memory: bytearray(n), repeated encodings, copies of a tensor that expands one value.
_CALLS = {"collections OrderedDict", "collections Counter", "__builtin__ set", "__builtin__ complex"}
_CALLS |= {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size", "torch device"}
_CALLS |= {f"torch {kind.__name__}" for kind in torch._storage_classes if kind.__module__ == "torch"}
_CALLS |= {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _check_calls(pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and argument not in _CALLS:
            raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")


def _not_only_weights(error: pickle.UnpicklingError) -> CheckpointError:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"it asks for {named[1]}" if named else "its pickle is damaged, or asks for code"
    return CheckpointError(
        f"the file holds more than weights ({what}), and is not opened",
        remedy="save its state_dict alone, in a program that you trust with it",
    )


def _state_dict(data: object) -> dict[Any, Any]:
    state = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(state, dict):
        raise CheckpointError(f"the file holds a {type(state).__name__}, not a state_dict", remedy=REMEDY)
    return state


def _by_prefix(path: Path, state: Mapping[Any, Any]) -> Published:
    """A state_dict's tensors, distributed to networks, head and skipped ones by the prefixes of their names."""
    published, unknown = Published(path), []
    kinds = {prefix: published.networks.setdefault(name, {}) for name, prefix in PREFIXES.items()}
    kinds[HEAD] = published.head
    if not any(isinstance(name, str) and name.startswith((*kinds, *FROZEN)) for name in state):
        kinds = {"": published.networks.setdefault(UNNAMED, {})}
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise CheckpointError(f"a tensor is called {_printable(repr(name))[:_LONGEST_NAME]}", remedy=REMEDY)
        if frozen := next((prefix for prefix in FROZEN if name.startswith(prefix)), None):
            published.skipped[frozen] += 1
        elif (prefix := next((prefix for prefix in kinds if name.startswith(prefix)), None)) is not None:
            kinds[prefix][name.removeprefix(prefix)] = _tensor(name, value)
        else:
            unknown.append(f"{name} is unknown")
    refuse(unknown, "this is not the published layout", REMEDY)
    published.networks = {name: tensors for name, tensors in published.networks.items() if tensors}
    if not published.networks:
        raise CheckpointError(
            f"no name begins with {' or '.join(PREFIXES.values())}: it holds no network", remedy=REMEDY
        )
    return published


def _printable(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        problem = f"is of type {type(value).__name__}, not a tensor"
    elif value.dtype not in TYPES:
        problem = f"is of type {plain(value.dtype)}; weights are {', '.join(map(plain, TYPES))}"
    elif not value.numel():
        problem = f"is empty: {list(value.shape)}"
    else:
        return value.detach()
    raise CheckpointError(f"{name} {problem}", remedy=REMEDY)


def head_differences(head: Mapping[str, Shape], hidden: int, prefix: str = HEAD) -> list[str]:
    """How a head's shapes differ from those of a `RepaHead`; a file without a head is right as well."""
    if not head:
        return []
    last = head.get("4.weight", ())
    with torch.device("meta"):
        expected = RepaHead(hidden, last[0] if last else 1)
    return differences(shapes(expected.state_dict()), head, prefix)

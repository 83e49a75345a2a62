"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): how far two images are apart, as a VGG-16 sees them.

The features of its five blocks are normalised over the channels, and their squared differences weighted by what people
told apart. Channels are counted from the tensors, so that a small network can stand in for the published one.

Shapes: B images, C channels.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import CheckpointError
from training.encoders import hub
from training.model.fit import refuse

FILES = ("*.safetensors", "*.pth", "*.pt")
# The places of VGG-16's convolutions among the layers of torchvision's `features`; each block but the last is pooled.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
LEAST_SIDE = 16  # pixels that four poolings leave one of
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], in LPIPS's own code
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_LEAST = 1e-10  # beside a norm
REMEDY = "name a folder or hub repository with torchvision's vgg16 and LPIPS's weights/v0.1/vgg.pth"


class Lpips(nn.Module):
    """Always frozen; gradients go to the images."""

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        weights = read(source)
        self.blocks = nn.ModuleList(nn.ModuleList(_convolution(weights, i) for i in block) for block in BLOCKS)
        for index in range(len(BLOCKS)):
            self.register_buffer(f"weight{index}", weights[_head(index)].float().view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """The distance [B] of images in [-1, 1]."""
        apart_B = torch.zeros(len(x_BCHW), device=x_BCHW.device)
        for index, (x, y) in enumerate(zip(self._features(x_BCHW), self._features(y_BCHW), strict=True)):
            weighted = self.get_buffer(f"weight{index}") * (_unit(x) - _unit(y)).square()
            apart_B = apart_B + weighted.sum(1).mean((1, 2))
        return apart_B

    def _features(self, x_BCHW: Tensor) -> Iterator[Tensor]:
        x_BCHW = (x_BCHW.float() - self.get_buffer("shift")) / self.get_buffer("scale")
        for index, block in enumerate(self.blocks):
            if index:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            for convolution in cast(nn.ModuleList, block):
                x_BCHW = F.relu(convolution(x_BCHW))
            yield x_BCHW


def _unit(x_BCHW: Tensor) -> Tensor:
    """Features divided by their norm over the channels, whose gradient is zero where they are, unlike a root's."""
    norm_B1HW: Tensor = torch.linalg.vector_norm(x_BCHW, dim=1, keepdim=True)
    return x_BCHW / (norm_B1HW + _LEAST)


def _convolution(weights: Mapping[str, Tensor], index: int) -> nn.Conv2d:
    weight, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    convolution.load_state_dict({"weight": weight, "bias": bias})
    return convolution


def read(source: str | Path) -> dict[str, Tensor]:
    """The tensors by the names that torchvision and LPIPS publish them under; refuses what is missing, by name."""
    folder = _folder(source)
    names = _names()
    weights: dict[str, Tensor] = {}
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        for name, tensor in _tensors(path, names.keys()).items():
            weights.setdefault(names[name], tensor)
    missing = [f"{name} is missing" for name in dict.fromkeys(names.values()) if name not in weights]
    refuse(missing or _misshapen(weights), f"{source} is no LPIPS with VGG-16", REMEDY)
    return weights


def _names() -> dict[str, str]:
    """What a tensor may be called -> what it is called here: as torchvision, or as the package `lpips` does."""
    names: dict[str, str] = {}
    for number, block in enumerate(BLOCKS):
        for index in block:
            for part in ("weight", "bias"):
                own = f"features.{index}.{part}"
                names |= {own: own, f"net.slice{number + 1}.{index}.{part}": own}
        names |= dict.fromkeys((_head(number), f"lins.{number}.model.1.weight"), _head(number))
    return names


def _head(number: int) -> str:
    return f"lin{number}.model.1.weight"


def _misshapen(weights: Mapping[str, Tensor]) -> list[str]:
    """What does not fit the layer before it."""
    places = [index for block in BLOCKS for index in block]
    widths = [3, *(weights[f"features.{index}.weight"].shape[0] for index in places)]
    expected: dict[str, tuple[int, ...]] = {}
    for index, (before, width) in zip(places, pairwise(widths), strict=True):
        expected |= {f"features.{index}.weight": (width, before, 3, 3), f"features.{index}.bias": (width,)}
    for number, block in enumerate(BLOCKS):
        expected[_head(number)] = (1, weights[f"features.{block[-1]}.weight"].shape[0], 1, 1)
    return [
        f"{name} is {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if tuple(weights[name].shape) != shape
    ]


def pinned(source: str) -> str:
    """The same with the commit that it means now, as `hub.pinned` does it for encoders; a folder stays a folder."""
    return source if Path(source).is_dir() else f"{hub.split(source)[0]}@{_folder(source).name}"


def _folder(source: str | Path) -> Path:
    """The folder itself, or that of a hub's repository, `name` or `name@revision`, in this machine's cache."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return hub.snapshot(*hub.split(str(source)), FILES)
    except Exception as error:  # the hub's library passes on the errors of whichever HTTP client it uses
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"no LPIPS can be had from {source} ({why})", remedy=REMEDY) from error


def _tensors(path: Path, wanted: Collection[str]) -> dict[str, Tensor]:
    """The file's tensors that are wanted. Torchvision's file also holds a classifier of 500 MB, which is not."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name in wanted}  # noqa: SIM118 - no dict
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: t for name, t in tensors.items() if name in wanted and isinstance(t, Tensor)}
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} holds no tensors that can be read ({why})", remedy=REMEDY) from None

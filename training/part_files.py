"""A rank's part of a state on its way to and from the store, at little cost to the training beside it.

A commit runs in a thread of the process that trains, so it must not hold Python's lock for long: the copies in host
memory are made once and used again, and the file is written in slices, each hashed as it goes. Ranks of one machine
share what they fetch, so that a state is read from the store once, however many of them need the same part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infra.errors import DataError, NotFound
from training.team import Team

_SLICE = 2**24  # bytes
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class HostCopies:
    """Copies of tensors in host memory, pinned where they come from a GPU. Each `take` overwrites those before."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = copy
            copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file of flat tensors in host memory; returns its sha256."""
    header, begin = dict[str, Any](), 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers behind it are aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        digest.update(head)
        for tensor in tensors.values():
            values = tensor.contiguous().view(torch.uint8).numpy().data
            for first in range(0, len(values), _SLICE):
                piece = values[first : first + _SLICE]
                file.write(piece)  # this and the next release the lock
                digest.update(piece)
    return digest.hexdigest()


class Shared(NamedTuple):
    """Files that this rank can open, and what is wrong with one of them, if anything."""

    folder: Path
    problem: str


def fetch_once(team: Team, wanted: Iterable[int], folder: Path, fetch: Callable[[int, Path], None]) -> Shared:
    """Brings what the ranks want to each machine once: its ranks share the work, and the folder of the first of them.

    Every rank must call it. Ranks are on one machine if they see each other's folders, whose names are random. `fetch`
    writes a file to a path; the folder of each rank must outlive the use of it by all of them.
    """
    own_wish = str(folder), set(wanted)
    places = team.on_each_rank(lambda: own_wish)
    here = [rank for rank, (place, _) in enumerate(places) if Path(place).exists()]
    common = Path(places[here[0]][0])
    needed = sorted({number for rank in here for number in places[rank][1]})
    own = needed[here.index(team.rank) :: len(here)]
    problems = team.on_each_rank(partial(_fetch_all, own, common, fetch))
    return Shared(common, next(filter(None, problems), ""))


def part(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def _fetch_all(numbers: Iterable[int], folder: Path, fetch: Callable[[int, Path], None]) -> str:
    for number in numbers:
        try:
            fetch(number, part(folder, number))
        except (NotFound, DataError) as error:
            return error.message
    return ""

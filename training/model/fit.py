"""Whether tensors fit where they are meant to go: their names and shapes against the expected ones, and the words
for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from infra.errors import CheckpointError

Shape = tuple[int, ...]

MOST_NAMED = 8  # problems that one message names
REMEDY = "import a whole and unchanged file of the published layout"


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape], prefix: str = "") -> list[str]:
    """What is missing, misshapen or left over, by the name that it has in the file: there the prefix stands before."""
    missing = [f"{prefix}{name} is missing" for name in expected if name not in found]
    misshapen = [
        f"{prefix}{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return missing + misshapen + [f"{prefix}{name} is left over" for name in found if name not in expected]


def refuse(problems: Iterable[str], what: str, remedy: str) -> None:
    """An error that names the first problems, if there are any; `what` they were found in."""
    named = list(problems)
    if named:
        more = f"; and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        raise CheckpointError(f"{what}: {'; '.join(named[:MOST_NAMED])}{more}", remedy=remedy)

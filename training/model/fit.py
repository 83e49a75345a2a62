"""Compares the names and shapes of tensors with the expected ones, and words the errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from infra.errors import CheckpointError

Shape = tuple[int, ...]

MOST_NAMED = 8  # most problems in one message
REMEDY = "import a whole and unchanged file of the published layout"


def plain(dtype: torch.dtype) -> str:
    """torch.float32 -> float32."""
    return str(dtype).removeprefix("torch.")


def shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(expected: Mapping[str, Shape], actual: Mapping[str, Shape], prefix: str = "") -> list[str]:
    """What is missing, of another shape or left over; in the file, `prefix` stands before each name."""
    missing = [f"{prefix}{name} is missing" for name in expected if name not in actual]
    misshapen = [
        f"{prefix}{name} is {list(actual[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    return missing + misshapen + [f"{prefix}{name} is left over" for name in actual if name not in expected]


def refuse(problems: Iterable[str], what: str, remedy: str) -> None:
    """Raises `<what>: <the first problems>` if there are any."""
    named = list(problems)
    if named:
        more = f"; and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        raise CheckpointError(f"{what}: {'; '.join(named[:MOST_NAMED])}{more}", remedy=remedy)

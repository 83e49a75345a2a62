"""Tables of cosines: worked out once for each size, and constants to a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def constant_table(make: Callable[P, T]) -> Callable[P, T]:
    """Remember what was made of the same arguments; a compiler takes the result as it is and does not look inside."""

    @functools.lru_cache(maxsize=64)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():  # or the first caller's mode would stick to the table
            return make(*args, **kwargs)

    @torch.compiler.assume_constant_result
    @functools.wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> T:
        made: T = remembered(*args, **kwargs)
        return made

    return table

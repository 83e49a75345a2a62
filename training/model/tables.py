"""Tables of cosines: worked out once for each size, and constants to a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Make = TypeVar("Make", bound=Callable[..., Any])


def constant_table(make: Make) -> Make:
    """Remember what was made of the same arguments; a compiler takes the result as it is and does not look inside."""

    @functools.lru_cache(maxsize=64)
    def remembered(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # or the first caller's mode would stick to the table
            return make(*args)

    @torch.compiler.assume_constant_result
    @functools.wraps(make)
    def table(*args: Any) -> Any:
        return remembered(*args)

    return cast(Make, table)

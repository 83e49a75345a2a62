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

    @functools.wraps(make)
    def table(*args: Any) -> Any:
        return remembered(*args)

    # What torch.compiler.assume_constant_result sets. Calling that would import the compiler, which takes seconds, into
    # every process that has a network, and most of them never compile it.
    table._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return cast(Make, table)

"""Tables that are computed once for each size, and that torch.compile takes for constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_table(compute: Function) -> Function:
    """Caches a function's results; torch.compile inserts them as constants without tracing the function."""

    @functools.lru_cache(maxsize=64)
    def cached(*args: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():  # otherwise the table would keep the first caller's mode
            return compute(*args)

    @functools.wraps(compute)
    def table(*args: Any) -> Any:
        return cached(*args)

    # This is what torch.compiler.assume_constant_result sets. Calling that would import the compiler, for seconds, in
    # every process that has a network, and most of them never compile it.
    table._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return cast(Function, table)

"""Makes a forward and a backward function one differentiable operator, which a compiler calls without tracing into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def operator(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]], *, gradients: int
) -> Callable[..., Tensor]:
    """Registers `pixnerd::<name>` and `pixnerd::<name>_backward`, and returns the first.

    `forward(*tensors, flag)` gives a tensor of the first one's shape and dtype. `backward(g, *tensors, flag)` gives the
    gradients of the first `gradients` tensors, of their shapes and dtypes. All results are contiguous.
    """
    run = torch.library.custom_op(f"pixnerd::{name}", forward, mutates_args=())
    run_backward = torch.library.custom_op(f"pixnerd::{name}_backward", backward, mutates_args=())

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.flag = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # asked for once: activation checkpointing gives them out once
        without = len(tensors) + 1 - gradients  # the other tensors and the flag
        return *run_backward(g, *tensors, ctx.flag), *[None] * without

    run.register_fake(lambda *inputs: empty_like(inputs[0]))
    run_backward.register_fake(lambda g, *inputs: tuple(map(empty_like, inputs[:gradients])))
    run.register_autograd(differentiate, setup_context=save)
    return run


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with its last axis contiguous: what the kernels that take strides need."""
    return x if x.stride(-1) == 1 else x.contiguous()

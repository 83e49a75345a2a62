"""The repeated blocks of a network: what is gathered, compiled and recomputed as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The blocks of each of its stacks, in their order."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList):
            yield list(part)


def recompute(module: nn.Module, every: int) -> None:
    """Let every N-th block of each stack keep its inputs only, and compute the rest anew in the backward pass.

    Chen et al. 2016, arXiv 1604.06174. It happens inside of the block's own call, so ZeRO 3 brings the weights together
    once for both. No block draws random numbers, so there is no generator whose state would have to be kept. In a
    module that is compiled as a whole, the compiler sees it and decides by itself what is kept of such a block.
    """
    for blocks in repeated(module):
        for block in blocks[every - 1 :: every]:
            block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def anew(*inputs: Any, **named: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return anew

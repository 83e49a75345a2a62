"""torch.compile for the network: whole, one graph for each input shape, or block by block."""

from __future__ import annotations

from typing import Any, Literal

import torch

from training.model.pixnerd import PixNerd
from training.model.repeated import recompute, repeated

SHAPES = 256  # most graphs of one network; PyTorch's limit of 8 is fewer than a set of aspect buckets


def compile_network(net: PixNerd, *, replay: bool = False) -> None:
    """Compile in place, which keeps the parameters' names; the compiler runs at the first call with each shape.

    `replay` records each shape's kernels as a CUDA graph, as small batches take longer to launch than to compute. An
    output is then overwritten by the next call. On a CPU it changes nothing.
    """
    net.compile(
        fullgraph=True,  # so that a graph break is an error, not only slow
        dynamic=False,  # with fixed sizes, kernels are faster and the rotary and coordinate tables are constants
        recompile_limit=SHAPES,
        mode="reduce-overhead" if replay else None,
    )


def compile_blocks(net: PixNerd) -> None:
    """Compile each kind of block once for each shape, in place; all blocks of a stack share its graph.

    What is hooked onto a block's call, as ZeRO 3 does, stays outside of the graph.
    """
    for blocks in repeated(net):
        for block in blocks:
            compiled: Any = torch.compile  # whose types do not know the limit yet
            block.forward = compiled(block.forward, fullgraph=True, dynamic=False, recompile_limit=SHAPES)


def set_execution(net: PixNerd, compile_: bool | Literal["blocks"], recomputed: int) -> None:
    """Compile the network for training, and let every `recomputed`-th block be computed anew in the backward pass."""
    if compile_ == "blocks":
        compile_blocks(net)
    if recomputed:
        recompute(net, recomputed)  # around what is compiled: the compiler is not to look into it
    if compile_ is True:
        compile_network(net)

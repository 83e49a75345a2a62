"""torch.compile for the network: one graph for each shape that it meets, and CUDA graphs where it only draws."""

from __future__ import annotations

from training.model.pixnerd import PixNerd

SHAPES = 256  # graphs that one network may have; PyTorch's own limit, 8, is fewer than a set of aspect buckets


def compile_network(net: PixNerd, *, replay: bool = False) -> None:
    """In place, so that parameters and their names stay as they are; the compiler runs at the first call of a shape.

    `replay` records each shape's kernels as a CUDA graph: at a small batch, launching them costs more than their work.
    The output then lives until the next call only. On a CPU it changes nothing.
    """
    net.compile(
        fullgraph=True,  # a graph break would be found here, not as lost speed
        dynamic=False,  # known sizes make better kernels, and rotary and coordinate tables into constants
        recompile_limit=SHAPES,
        mode="reduce-overhead" if replay else None,
    )

"""torch.compile for the network: one graph for each input shape, and CUDA graphs for sampling."""

from __future__ import annotations

from training.model.pixnerd import PixNerd

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

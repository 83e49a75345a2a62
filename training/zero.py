"""Where ZeRO keeps a rank's fp32 weights: the one file that knows the insides of DeepSpeed's optimisers.

Each of them holds a few flat fp32 tensors a rank, the masters, and every optimiser's moments have their shape. ZeRO 1
and 2, with or without fp32 gradients, cut a vector of all parameters into equal parts; ZeRO 3 cuts every parameter. A
`Fragment` says which range of which parameter lies where, so what is saved by parameter and range fits all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from training.model.repeated import repeated


class Fragment(NamedTuple):
    """A range of a parameter's own flat vector, and its place in one of the rank's flat tensors."""

    name: str
    start: int
    end: int
    flat: int  # which of the flat tensors
    offset: int  # where in it

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach()[self.offset : self.offset + self.end - self.start]


def gather_by_block(module: nn.Module) -> None:
    """Tells ZeRO 3, before it takes the module, what to bring together when.

    It goes by calls of modules, and would miss weights that are used without one: in a method, or by another module. So
    a repeated block is brought together as one, and what lies outside of all blocks for a whole pass.
    """
    from deepspeed.runtime.zero import register_external_parameter
    from deepspeed.utils import set_z3_leaf_module

    blocks = [block for stack in repeated(module) for block in stack]
    for block in blocks:
        set_z3_leaf_module(block, True)
    inside = {parameter for block in blocks for parameter in block.parameters()}
    for parameter in module.parameters():
        if parameter not in inside:
            register_external_parameter(module, parameter)


def masters(zero: Any) -> list[Tensor]:
    """This rank's fp32 weights, as the optimiser itself holds them; a tensor may end with padding."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):  # ZeRO 3; ZeRO 1 and 2; ZeRO 1 with fp32 gradients
            return list(getattr(zero, name))
    raise TypeError(f"{type(zero).__name__} is no optimiser of ZeRO 1, 2 or 3")


def fragments(zero: Any, names: Mapping[nn.Parameter, str], rank: int) -> list[Fragment]:
    """Everything that this rank owns, in the order of the parameters."""
    found = _cut_each(zero, names, rank) if _is_stage_3(zero) else _cut_together(names)
    return [fragment for fragment in found if fragment.start < fragment.end]


def refresh_weights(zero: Any) -> None:
    """Makes the weights that the forward pass uses from the masters, on all ranks."""
    if not _is_stage_3(zero):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _cut_together(names: Mapping[nn.Parameter, str]) -> Iterator[Fragment]:
    for parameter, name in names.items():
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, own.start, own.start + own.numel, mapping.param_group_index, flat.start)


def _cut_each(zero: Any, names: Mapping[nn.Parameter, str], rank: int) -> Iterator[Fragment]:
    for parameter, name in names.items():
        flat, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        numel = int(parameter.ds_numel)  # type: ignore[attr-defined]
        yield Fragment(name, min(rank * length, numel), min((rank + 1) * length, numel), flat, offset)

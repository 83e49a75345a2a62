"""The only user of DeepSpeed beside `zero.py`: a ZeRO engine (Rajbhandari et al. 2019, arXiv 1910.02054).

A rank's fp32 state is a few flat tensors, cut as the stage of ZeRO and the number of ranks have it. What is saved of it
is named by parameter and range, in safetensors: no pickle, and any other number of ranks, at any stage, reads back what
it owns.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from training.muon import Muon, Piece
from training.optim import OptimSettings, optimiser
from training.zero import Fragment, fragments, gather_by_block, masters, refresh_weights

Precision = Literal["fp32", "bf16"]
Stage = Literal[1, 2, 3]


def prepare_environment() -> None:
    """Set what DeepSpeed reads at import. It builds a small C++ op, once if all runs share its folder."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    # ninja is installed beside this interpreter, a folder that need not be on the PATH of a Ray worker.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def extensions_folder() -> Path:
    """Where PyTorch keeps the ops that it compiles: inside the virtual environment that they were compiled for."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    home = Path(sys.prefix) if sys.prefix != sys.base_prefix else Path.home() / ".cache"
    return home / "torch_extensions"


def import_deepspeed() -> Any:
    """DeepSpeed without MLflow, which its autotuner imports: that takes seconds on every rank, and is not used here."""
    prepare_environment()
    hide = "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # None makes an import fail as if it were not installed
    try:
        import deepspeed
    finally:
        if hide:
            del sys.modules["mlflow"]
    return deepspeed


def build_ops() -> None:
    """Build DeepSpeed's op in advance, so that the first training run does not wait for a compiler."""
    import_deepspeed()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)


class Engine:
    """Takes one optimiser step at a time over micro-batches, and hides all sharding."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimSettings,
        *,
        zero: Stage = 1,
        offload: bool = False,
        exact_gradients: bool = False,
        precision: Precision = "fp32",
        micro_batch: int,
        accumulate: int = 1,
    ) -> None:
        deepspeed = import_deepspeed()
        deepspeed.utils.logger.setLevel(logging.ERROR)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.micro_batch = micro_batch
        names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
        exact = {name: p.detach().clone() for p, name in names.items()} if precision == "bf16" else {}
        if zero == 3:
            gather_by_block(module)
        optimizer = optimiser(module.named_parameters(), optim)
        self._groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={
                "train_batch_size": micro_batch * accumulate * self.ranks,
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": optim.clip,
                "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},  # in fp32 it always looks
                "data_types": {"grad_accum_dtype": "fp32" if exact_gradients else None},
                "zero_optimization": _zero_config(zero, offload),
                "zero_allow_untested_optimizer": True,  # Muon is AdamW by class, but not by name
                "zero_force_ds_cpu_optimizer": False,  # PyTorch's own AdamW is fused on CPUs, and needs no compiler
                "steps_per_print": sys.maxsize,
                "wall_clock_breakdown": False,
            },
            dist_init_required=False,
        )
        self._zero = self._engine.optimizer
        self.device = self._engine.device
        self.masters = masters(self._zero)
        self.fragments = fragments(self._zero, names, self.rank)
        for fragment in self.fragments if exact else ():
            # DeepSpeed makes the masters of weights that it has rounded to bf16; here they get their own again. Else a
            # stage would begin with every weight moved by up to 0.4 %, before it has learnt anything.
            fragment.of(self.masters[fragment.flat]).copy_(
                exact[fragment.name].flatten()[fragment.start : fragment.end]
            )
        self.shapes = {name: tuple(_full_shape(parameter)) for parameter, name in names.items()}
        if isinstance(self._optimizer, Muon):
            self._optimizer.pieces = self._pieces()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._zero.optimizer
        return optimizer

    def step(self, micro_batches: Iterable[Any], lr: float) -> tuple[list[Any], torch.Tensor | float]:
        """Forward, backward and update; the module returns (loss, report) for each micro-batch.

        Returns the reports and the gradient's norm before clipping. Where that is not finite nothing was updated.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr * group["share"]
        reports = []
        for inputs in micro_batches:
            loss, report = self._engine(inputs)
            self._engine.backward(loss)
            self._engine.step()
            reports.append(report)
        norm: torch.Tensor | float = self._engine.get_global_grad_norm()
        return reports, 0.0 if norm is None else norm

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Any]) -> list[Any]:
        """The module's reports, and nothing is learnt; with ZeRO 3 every rank must bring as many micro-batches."""
        self._engine.eval()
        try:
            return [self._engine(inputs)[1] for inputs in micro_batches]
        finally:
            self._engine.train()

    def state(self) -> dict[str, torch.Tensor]:
        """`kind/parameter` -> this rank's fragment of it, for the masters and the optimiser's moments."""
        tensors: dict[str, torch.Tensor] = {}
        for number, master in enumerate(self.masters):
            moments = {"master": master, **self._optimizer.state.get(master, {})}
            for kind in self._kinds(master):
                flat = moments[kind] if kind in moments else torch.zeros_like(master)  # before the first step
                own = (fragment for fragment in self.fragments if fragment.flat == number)
                tensors |= {f"{kind}/{fragment.name}": fragment.of(flat) for fragment in own}
        return tensors

    def load_state(self, read: Callable[[str, Fragment], torch.Tensor], step: int) -> None:
        """`read(kind, fragment)` gives a fragment of what `state` told after `step` updates."""
        for number, master in enumerate(self.masters):
            values = {kind: torch.zeros_like(master).detach() for kind in self._kinds(master)}
            for kind, flat in values.items():
                for fragment in self.fragments:
                    if fragment.flat == number:
                        fragment.of(flat).copy_(read(kind, fragment))
            with torch.no_grad():
                master.copy_(values.pop("master"))
            if step:  # a fused optimiser counts its steps beside the weights
                self._optimizer.state[master] = {"step": torch.tensor(float(step), device=master.device), **values}
        refresh_weights(self._zero)

    def _kinds(self, master: torch.Tensor) -> tuple[str, ...]:
        muon = isinstance(self._optimizer, Muon) and master in self._optimizer.pieces
        return ("master", "exp_avg") if muon else ("master", "exp_avg", "exp_avg_sq")

    def begins(self) -> dict[str, tuple[int, int]]:
        """The group of every parameter, and where it begins if a group's parameters are laid end to end."""
        places = {}
        for number, group in enumerate(self._groups):
            begin = 0
            for name in group:
                places[name] = (number, begin)
                begin += math.prod(self.shapes[name])
        return places

    def _pieces(self) -> dict[torch.Tensor, list[Piece]]:
        """The matrices of every flat tensor that Muon moves."""
        pieces: dict[torch.Tensor, list[Piece]] = {}
        for number, (master, group) in enumerate(zip(self.masters, self._zero.param_groups, strict=True)):
            if group["muon"]:
                own = [fragment for fragment in self.fragments if fragment.flat == number]
                pieces[master] = [self._piece(fragment, len(master)) for fragment in own]
        return pieces

    def _piece(self, fragment: Fragment, size: int) -> Piece:
        """Ranks own ranges of `size` of a group's vector, so where a matrix begins says who has the rest of it."""
        rows, columns = self.shapes[fragment.name]
        begin = self.rank * size + fragment.offset - fragment.start
        first, last = begin // size, (begin + rows * columns - 1) // size
        cuts = (0, *(owner * size - begin for owner in range(first + 1, last + 1)), rows * columns)
        return Piece((rows, columns), fragment.start, fragment.end, fragment.offset, cuts, first)

    def close(self) -> None:
        self._engine.destroy()


def _zero_config(stage: Stage, offload: bool) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    # On a GPU, copying gradients into one buffer avoids fragmented memory; on a CPU it only costs time.
    config: dict[str, Any] = {"stage": stage, "contiguous_gradients": gpu}
    if offload:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    return config


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """ZeRO 3 leaves a parameter empty between its uses, and remembers what it was."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


if __name__ == "__main__":  # `make setup`
    build_ops()

"""DeepSpeed, only here: a module and an optimiser become a ZeRO engine whose state is a few flat fp32 tensors a rank.

ZeRO 1 and 2 lay all parameters of a group end to end in one flat vector and give each rank an equal range of it. That
vector's coordinates do not depend on the number of ranks (only the padding at its very end does), so a training state
is saved as ranges of it, in safetensors: no pickle, and any other number of ranks can read back the ranges it owns.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from training.optim import OptimSettings, adamw

Precision = Literal["fp32", "bf16"]
KINDS = ("master", "exp_avg", "exp_avg_sq")


def prepare_environment() -> None:
    """What DeepSpeed reads at import. It builds one small C++ op; one folder for all runs means it is built once."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    # ninja is installed beside this interpreter, which need not be on the PATH of a Ray worker.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = beside + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def extensions_folder() -> Path:
    """Where PyTorch keeps the ops that it compiles: with the environment that they were compiled for."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    home = Path(sys.prefix) if sys.prefix != sys.base_prefix else Path.home() / ".cache"
    return home / "torch_extensions"


def import_deepspeed() -> Any:
    """DeepSpeed without MLflow, which its autotuner would import, for seconds on every rank; nothing here uses that."""
    prepare_environment()
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # so Python is told that a module is not there
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed


def build_ops() -> None:
    """Build DeepSpeed's op in advance, so that the first training run does not wait for a compiler."""
    import_deepspeed()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)


class Engine:
    """One optimiser step at a time over micro-batches; everything about sharding stays behind this."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimSettings,
        *,
        zero: Literal[1, 2] = 1,
        precision: Precision = "fp32",
        micro_batch: int,
        accumulate: int = 1,
    ) -> None:
        deepspeed = import_deepspeed()
        deepspeed.utils.logger.setLevel(logging.ERROR)
        ranks = dist.get_world_size()
        self.module, self.rank, self.ranks = module, dist.get_rank(), ranks
        self.micro_batch = micro_batch
        config = {
            "train_batch_size": micro_batch * accumulate * ranks,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": optim.clip,
            # Gradients of this size are copied for nothing on a CPU; on a GPU the copy keeps memory whole.
            "zero_optimization": {"stage": zero, "contiguous_gradients": torch.cuda.is_available()},
            "bf16": {"enabled": precision == "bf16"},
            "steps_per_print": sys.maxsize,
            "wall_clock_breakdown": False,
        }
        rounded = precision == "bf16"
        exact = {p: p.detach().clone() for p in module.parameters() if rounded and p.requires_grad}
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(module.parameters(), optim), config=config, dist_init_required=False
        )
        self._zero = self._engine.optimizer
        self.device = self._engine.device
        if rounded:
            self._restore_masters(exact)

    @torch.no_grad()
    def _restore_masters(self, exact: dict[nn.Parameter, torch.Tensor]) -> None:
        """DeepSpeed makes the masters of weights that it has rounded to bf16 already; here they get their own again.

        Else a stage would begin with every weight moved by up to 0.4 %, before it has learnt anything.
        """
        for group, (master, (start, end)) in enumerate(zip(self.masters, self.ranges(), strict=True)):
            offsets = self._zero.round_robin_bit16_offsets[group]
            for parameter, offset in zip(self._zero.round_robin_bit16_groups[group], offsets, strict=True):
                first, last = max(start, offset), min(end, offset + parameter.numel())
                if first < last:
                    master[first - start : last - start] = exact[parameter].flatten()[first - offset : last - offset]

    def step(self, micro_batches: Iterable[Any], lr: float) -> tuple[list[Any], float]:
        """Forward, backward and update; the module gives (loss, report) for each micro-batch.

        Returns the reports and the gradient's norm before clipping.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        reports = []
        for inputs in micro_batches:
            loss, report = self._engine(inputs)
            self._engine.backward(loss)
            self._engine.step()
            reports.append(report)
        return reports, float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def masters(self) -> list[torch.Tensor]:
        """This rank's range of each group's fp32 weights."""
        masters: list[torch.Tensor] = self._zero.single_partition_of_fp32_groups
        return masters

    def ranges(self) -> list[tuple[int, int]]:
        """Where this rank's part lies in each group's flat vector, without the padding at the end."""
        found = []
        for group, master in enumerate(self.masters):
            start = self.rank * master.numel()
            found.append((start, max(start, min(start + master.numel(), self._length(group)))))
        return found

    def _length(self, group: int) -> int:
        offset = self._zero.round_robin_bit16_offsets[group][-1]
        return int(offset + self._zero.round_robin_bit16_groups[group][-1].numel())

    def state(self) -> dict[str, torch.Tensor]:
        """`kind.group` -> this rank's range, for the kinds master, exp_avg and exp_avg_sq."""
        tensors: dict[str, torch.Tensor] = {}
        for group, (master, (start, end)) in enumerate(zip(self.masters, self.ranges(), strict=True)):
            moments = self._zero.optimizer.state.get(master, {})
            for kind in KINDS:
                value = master if kind == "master" else moments.get(kind, torch.zeros_like(master))
                tensors[f"{kind}.{group}"] = value.detach()[: end - start]
        return tensors

    def load_state(self, read: Callable[[str, int, int], torch.Tensor], step: int) -> None:
        """`read(name, start, end)` gives a range of a flat vector that was saved after `step` updates."""
        optimizer, moments = self._zero.optimizer, {}
        for group, (master, (start, end)) in enumerate(zip(self.masters, self.ranges(), strict=True)):
            values = {}
            for kind in KINDS:
                flat = torch.zeros_like(master)
                flat[: end - start] = read(f"{kind}.{group}", start, end).to(master)
                values[kind] = flat.detach()
            with torch.no_grad():
                master.copy_(values.pop("master"))
            moments[group] = {"step": torch.tensor(float(step)), **values}
        if step:  # PyTorch knows where its optimiser wants each of them: a fused one counts steps on the GPU
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        self._zero.update_lp_params()

    def gather(self, shards: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Flat shards, cut as the masters are, back to named parameters of their own shapes, on the CPU of rank 0.

        Every rank must call it; the others get an empty dict.
        """
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        tensors: dict[str, torch.Tensor] = {}
        for group, shard in enumerate(shards):
            parts = [torch.empty_like(shard) for _ in range(self.ranks)]
            dist.all_gather(parts, shard.detach().contiguous())
            if self.rank:
                continue
            flat = torch.cat(parts).cpu()
            offsets = self._zero.round_robin_bit16_offsets[group]
            for parameter, offset in zip(self._zero.round_robin_bit16_groups[group], offsets, strict=True):
                piece = flat[offset : offset + parameter.numel()]
                tensors[names[id(parameter)]] = piece.view(parameter.shape).clone()
        return tensors

    def close(self) -> None:
        self._engine.destroy()


if __name__ == "__main__":  # `make setup`
    build_ops()

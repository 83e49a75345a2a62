"""The only user of DeepSpeed: a ZeRO engine whose state is, on each rank, a few flat fp32 tensors.

ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054) stages 1 and 2 concatenate the parameters of a group into one flat
vector and give each rank an equal range of it. Positions in that vector do not depend on the number of ranks (only the
padding at its end does), so a training state is saved as ranges of it in safetensors: without pickle, and any other
number of ranks can read the ranges that it needs.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn

from training.optim import OptimSettings, adamw

Precision = Literal["fp32", "bf16"]
KINDS = ("master", "exp_avg", "exp_avg_sq")


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
            # On a GPU, copying gradients into one buffer avoids fragmented memory; on a CPU it only costs time.
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
        """Overwrite the fp32 masters, which DeepSpeed makes of weights already rounded to bf16, with the exact weights.

        Otherwise a stage would start with every weight changed by up to 0.4 %.
        """
        for group, (master, (start, end)) in enumerate(zip(self.masters, self.ranges(), strict=True)):
            for parameter, offset in self._layout(group):
                first, last = max(start, offset), min(end, offset + parameter.numel())
                if first < last:
                    master[first - start : last - start] = exact[parameter].flatten()[first - offset : last - offset]

    def step(self, micro_batches: Iterable[Any], lr: float) -> tuple[list[Any], float]:
        """Forward, backward and update; the module returns (loss, report) for each micro-batch.

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
        return cast(list[torch.Tensor], self._zero.single_partition_of_fp32_groups)

    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) of this rank's part of each group's flat vector, without the padding at the vector's end."""
        ranges = []
        for group, master in enumerate(self.masters):
            *_, (last, offset) = self._layout(group)
            start, length = self.rank * master.numel(), offset + last.numel()
            ranges.append((start, max(start, min(start + master.numel(), length))))
        return ranges

    def _layout(self, group: int) -> Iterator[tuple[nn.Parameter, int]]:
        """A group's parameters in the order of its flat vector, each with its offset in it."""
        offsets = self._zero.round_robin_bit16_offsets[group]
        return zip(self._zero.round_robin_bit16_groups[group], offsets, strict=True)

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's range of each flat vector, by `<kind>.<group>`, such as `exp_avg.0`."""
        tensors: dict[str, torch.Tensor] = {}
        for group, (master, (start, end)) in enumerate(zip(self.masters, self.ranges(), strict=True)):
            moments = self._zero.optimizer.state.get(master, {})
            for kind in KINDS:
                value = master if kind == "master" else moments.get(kind, torch.zeros_like(master))
                tensors[f"{kind}.{group}"] = value.detach()[: end - start]
        return tensors

    def load_state(self, read: Callable[[str, int, int], torch.Tensor], step: int) -> None:
        """Load the state saved after `step` updates; `read(name, start, end)` gives a range of a flat vector."""
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
        if step:  # through load_state_dict, which moves each tensor where it belongs: a fused AdamW's `step` to the GPU
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        self._zero.update_lp_params()

    def gather(self, shards: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """All ranks' flat shards, cut like the masters, as parameters by name in CPU memory of rank 0.

        Every rank must call it; all but rank 0 get an empty dict.
        """
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        tensors: dict[str, torch.Tensor] = {}
        for group, shard in enumerate(shards):
            parts = [torch.empty_like(shard) for _ in range(self.ranks)]
            dist.all_gather(parts, shard.detach().contiguous())
            if self.rank:
                continue
            flat = torch.cat(parts).cpu()
            for parameter, offset in self._layout(group):
                values = flat[offset : offset + parameter.numel()]
                tensors[names[id(parameter)]] = values.view(parameter.shape).clone()
        return tensors

    def close(self) -> None:
        self._engine.destroy()


if __name__ == "__main__":  # `make setup`
    build_ops()

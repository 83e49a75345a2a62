"""A small run through the loop with DeepSpeed on this device: its state, loaded, and the run that goes on from it.

Three runs have the same settings: two go straight to their end and publish, the third is broken off behind its first
state, as a kill would, and started again. A GPU may take sums in another order each time, so the two straight runs
tell how far apart equal runs end.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from infra.records import CheckpointRecord, get_data
from infra.store import FileStore
from tests.gpu import encoders, inputs
from tests.gpu.parts import APART, STATES
from tests.gpu.report import Options, Report
from tests.gpu.small import MODEL
from training import loop, states
from training import model as models
from training.ema import Ema
from training.engine import Engine
from training.job import Job
from training.loop import train
from training.networks import build, fetch
from training.team import Team

STEPS, SAVED = 8, 4


class Killed(Exception):
    """Stands for the death of the process."""


class Keeps(FileStore):
    """Nothing is deleted, so that the state from which a run went on can be looked at."""

    def delete(self, key: str) -> None: ...


class Loaded(NamedTuple):
    same: bool  # bit for bit
    fused: bool
    steps: set[float]  # of the optimiser, one a flat tensor


def check(report: Report, options: Options) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may differ between equal calls
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Keeps(folder / "store")
        snapshot = inputs.write_data(store, folder, MODEL["image_size"])
        encoders.write(folder, tiny=True, device=options.device)
        inputs.start_rank(options.device)
        for precision in STATES:
            names = (f"{name}-{precision}" for name in ("first", "second", "broken"))
            _check(report, precision, *(inputs.job(store, folder, snapshot, n, _settings(precision)) for n in names))


def _settings(precision: str) -> dict[str, Any]:
    return {
        "preset": "XXL/16",
        "model": MODEL,
        "steps": STEPS,
        "batch": 4,
        "precision": precision,
        "optim": {"lr": 1e-3, "weight_decay": 0.01},
        "objective": {"repa": 0.5, "repa_block": 1},
        "train_text": 1,
        "log_every": 1,
        "save_every": SAVED,
    }


def _check(report: Report, precision: str, first: Job, second: Job, broken: Job) -> None:
    straight = [train(job, lambda message: None) for job in (first, second)]
    _break_off(broken)
    found = loaded(broken)
    good = found.same and found.fused and found.steps == {SAVED}
    told = f"the same bits {found.same}, fused {found.fused}, steps {sorted(found.steps)}"
    report.figure(f"{precision}: the state of a fused AdamW, loaded", told, failed=not good)
    resumed = train(broken, lambda message: None)
    records = zip((first, second, broken), (*straight, resumed), strict=True)
    one, other, third = (_weights(job, record) for job, record in records)
    noise, apart = distance(one, other), distance(one, third)
    told = f"{apart:.1e} of the largest weight (two straight runs: {noise:.1e})"
    report.figure(f"{precision}: a killed and resumed run against a straight one", told, failed=apart > APART * noise)


def _break_off(job: Job) -> None:
    def say(message: dict[str, Any]) -> None:
        if message["event"] == "saved":
            raise Killed

    try:
        train(job, say)
    except Killed:
        return
    raise AssertionError("the run came to its end without a state")


def loaded(job: Job) -> Loaded:
    """What a new engine has after it has read the newest state, held against the state's own tensors."""
    with tempfile.TemporaryDirectory() as folder:
        networks = build(job.settings, fetch(job, Path(folder)))
        engine = loop._shard(networks, job.settings, 1)
        ema = Ema(engine.masters, job.settings.ema)
        state = states.resume(job.store, job.prefix, Team(), engine, ema, print)
        assert state is not None and state.step == SAVED
        [file] = state.files
        saved = load(get_data(job.store, file.data))
        found = states.collected(engine, ema).tensors
        same = saved.keys() == found.keys() and all(torch.equal(saved[name], found[name].cpu()) for name in saved)
        return Loaded(same, _fused(engine), {float(s["step"]) for s in engine._optimizer.state.values()})


def _fused(engine: Engine) -> bool:
    return all(group["fused"] for group in engine._optimizer.param_groups)


def _weights(job: Job, record: CheckpointRecord) -> dict[str, Tensor]:
    return load(get_data(job.store, record.files[models.WEIGHTS]))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a weight, as a share of the largest weight of its tensor; infinite where not finite."""
    shares = [
        float((other[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)) for name, tensor in one.items()
    ]
    return max(shares) if all(share < float("inf") for share in shares) else float("inf")

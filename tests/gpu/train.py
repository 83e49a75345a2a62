"""XXL/16 in training: the loop itself with DeepSpeed, both encoders and pictures from a shard, one GPU.

The run warms up, is measured over some log lines, is watched by the profiler over one more, and is broken off: what a
checkpoint costs is not asked here, and `resume` publishes one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from infra.store import FileStore
from tests.gpu import encoders, inputs
from tests.gpu.parts import BATCH, PEAK_TFLOPS, TRAIN_TFLOP
from tests.gpu.report import Options, Report
from tests.gpu.small import MODEL
from training.loop import train

LINE = 4  # steps between log lines
WARM_UP, MEASURED = 2, 5  # lines
KERNELS = 8  # that the profile names


class Enough(Exception):
    """All that was wanted has been measured."""


class Watch:
    """Takes the run's messages; they come from the thread that trains."""

    def __init__(self, gpu: bool) -> None:
        self.gpu, self.lines = gpu, 0
        self.rows: list[dict[str, float]] = []
        self.profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
        self.began = self.seconds = 0.0
        self.peak = "not counted on a CPU"

    def __call__(self, message: dict[str, Any]) -> None:
        if message["event"] != "log":
            return
        self.lines += 1
        if WARM_UP < self.lines <= WARM_UP + MEASURED:
            self.rows.append(message)
        if self.lines == WARM_UP + MEASURED:
            if self.gpu:
                self.peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            self.began = time.perf_counter()
            self.profile.start()
        if self.lines > WARM_UP + MEASURED:
            self.seconds = time.perf_counter() - self.began
            self.profile.stop()
            raise Enough

    def middle(self, name: str) -> float:
        return statistics.median(row[name] for row in self.rows)


def measure(report: Report, options: Options, *, size: int, compiled: bool) -> None:
    watch = Watch(options.gpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = _settings(options, size, compiled)
        store = FileStore(folder / "store")
        snapshot = inputs.write_data(store, folder, MODEL["image_size"] if options.tiny else size)
        encoders.write(folder, tiny=options.tiny, device=options.device)
        inputs.start_rank(options.device)
        try:
            train(inputs.job(store, folder, snapshot, "full", settings), watch)
        except Enough:
            _tell(report, watch, size, settings["batch"])


def _settings(options: Options, size: int, compiled: bool) -> dict[str, Any]:
    batch = options.batch or (2 if options.tiny else BATCH[size])
    return {
        "preset": "XXL/16",
        "model": MODEL if options.tiny else {"image_size": size},
        "steps": LINE * (WARM_UP + MEASURED + 2),
        "batch": batch,
        "precision": "bf16",
        "optim": {"lr": 1e-5},
        "objective": {"repa": 0.5, "repa_block": 1 if options.tiny else 6},
        "compile": compiled,
        "log_every": LINE,
        "save_every": 1000 * LINE,
    }


def _tell(report: Report, watch: Watch, size: int, batch: int) -> None:
    rate = watch.middle("perf/images_per_second")
    low, high = (pick(row["perf/images_per_second"] for row in watch.rows) for pick in (min, max))
    report.figure("images a second", f"{rate:.1f} [{low:.1f}, {high:.1f}], batch {batch}")
    report.figure(f"MFU of {PEAK_TFLOPS} TFLOP/s", f"{100 * rate * TRAIN_TFLOP[size] / PEAK_TFLOPS:.1f} %")
    report.figure("peak memory", watch.peak)
    report.figure("share of time that waits for data", f"{100 * watch.middle('perf/data_wait'):.1f} %")
    shares = kernel_shares(watch.profile, watch.seconds, watch.gpu)
    report.figure("share of time in which kernels run", f"{100 * sum(shares.values()):.0f} %, while profiled")
    most = sorted(shares.items(), key=lambda item: -item[1])[:KERNELS]
    named = (f"{name[:60]} {100 * share:.0f} %" for name, share in most)
    report.figure("profile: the kernels that take most", "; ".join(named) + " of the time")


def kernel_shares(found: profile, seconds: float, gpu: bool) -> dict[str, float]:
    """Name -> share of the profiled time; on a GPU of its kernels alone, as an operation holds its kernels' time."""
    shares = {}
    for event in found.key_averages():
        if gpu and event.device_type.name == "CUDA":
            shares[event.key] = event.self_device_time_total / 1e6 / seconds
        elif not gpu and event.self_cpu_time_total:
            shares[event.key] = event.self_cpu_time_total / 1e6 / seconds
    return shares

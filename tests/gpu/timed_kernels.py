"""`bench_kernels` as rows of the table."""

from __future__ import annotations

import statistics

from tests.bench import bench_kernels
from tests.bench.bench_kernels import CALLS, CASES, Sizes
from tests.gpu.report import Options, Report

TINY = Sizes(images=1, tokens=4, heads=2, head_dim=16, channels=16, ratio=2, pixels=16, device="cpu")
ROUNDS = 11


def measure(report: Report, options: Options) -> None:
    sizes = TINY if options.tiny else Sizes(device=options.device)
    for name, make in CASES.items():
        for mode, times in bench_kernels.measured(make(sizes), 1 if options.tiny else ROUNDS).items():
            middles = {side: f"{statistics.median(found) / CALLS * 1e3:.3f}" for side, found in times.items()}
            others = ", ".join(f"{side} {middle}" for side, middle in middles.items() if side != "kernel")
            report.figure(f"{name}, {mode}: ms", f"{middles['kernel']} ({others})")

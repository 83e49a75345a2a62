"""Several ways to do the same, timed in turn, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Side = Callable[[], object]


def compare(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each side; two more, before them, warm up (and compile)."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 2):
        for name, side in sides.items():
            _wait()
            began = time.perf_counter()
            side()
            _wait()
            if round_ > 1:
                times[name].append(time.perf_counter() - began)
    return times


def show(times: Mapping[str, list[float]], against: tuple[str, ...]) -> None:
    """Medians with the least and the most, and how many times faster than `against` (round by round)."""
    width = max(map(len, times))
    print(f"{'':{width}}  {'median':>10}   {'spread':17}" + "".join(f"  times {name:20}" for name in against))
    for name, found in times.items():
        line = f"{name:{width}}  {statistics.median(found) * 1e3:7.1f} ms   {_span(found, 1e3, 1):17}"
        for other in against:
            ratios = [theirs / mine for theirs, mine in zip(times[other], found, strict=True)]
            line += f"  {statistics.median(ratios):5.2f} {_span(ratios, 1, 2):20}"
        print(line.rstrip())


def show_floor(times: Mapping[str, list[float]], seconds: float) -> None:
    for name, found in times.items():
        print(f"{name}: {statistics.median(found) / seconds:.2f} times the floor of {seconds * 1e3:.2f} ms")


def _span(values: list[float], unit: float, digits: int) -> str:
    return f"[{min(values) * unit:.{digits}f}, {max(values) * unit:.{digits}f}]"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

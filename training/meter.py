"""The figures of a run's curve: losses, REPA cosines and speeds between two log lines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.step import TIME_BINS, Report


class Meter:
    """Adds up this rank's steps between two log lines; `read` adds the ranks up."""

    def __init__(self, device: torch.device) -> None:
        self.steps = self.reports = self.images = 0
        # Loss, losses by bin, counts by bin; images that could not be decoded, and captions that were cut. They stay on
        # the device, as reading them back stalls a step.
        self.sums = torch.zeros(3 + 2 * TIME_BINS, dtype=torch.float64, device=device)
        self.means: dict[str, torch.Tensor] = {}  # of what not every step has: sum, and of how many
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)  # steps whose gradient was finite
        self.waited = 0.0

    def add(self, reports: list[Report], grad_norm: torch.Tensor | float, waited: float) -> None:
        """A step whose gradient is not finite, which no rank has taken, adds to the counts of what went wrong only."""
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=self.sums.device)
        finite = norm.isfinite()
        self.steps += 1
        self.taken += finite
        self.grad_norm += torch.where(finite, norm, 0.0)
        self.waited += waited
        self.reports = len(reports)
        for report in reports:
            self.images += report.images
            values = torch.cat([report.loss.float()[None], report.loss_by_time.float(), report.count_by_time.float()])
            self.sums[:-2] += torch.where(finite, values, 0.0)
            self.sums[-2] += report.unreadable
            self.sums[-1] += report.truncated
            for name, mean in report.means.items():
                self.means.setdefault(name, self.sums.new_zeros(2))
                self.means[name] += torch.where(finite, torch.stack(mean).float(), 0.0)

    def read(self, ranks: int, seconds: float, rate: float) -> dict[str, float]:
        """The means over steps and ranks so far; every rank must call it. The loss is NaN where no step was taken."""
        sums, taken = torch.cat([self.sums, *self.means.values()]), int(self.taken)
        if ranks > 1:
            torch.distributed.all_reduce(sums)
        sums, means = sums[: len(self.sums)], sums[len(self.sums) :].view(-1, 2)
        values: dict[str, float] = {
            "train/loss": float(sums[0] / (taken * self.reports * ranks)),
            "train/grad_norm": float(self.grad_norm) / max(1, taken),
            "train/lr": rate,
            "perf/images_per_second": self.images * ranks / seconds,
            "perf/data_wait": self.waited / seconds,
            "data/unreadable": float(sums[-2]),
            "data/truncated_captions": float(sums[-1]),
        }
        if taken < self.steps:
            values["train/skipped_steps"] = self.steps - taken
        named = zip(self.means, means.tolist(), strict=True)
        values |= {name: total / count for name, (total, count) in named if count}
        totals, counts = sums[1 : 1 + TIME_BINS].tolist(), sums[1 + TIME_BINS : -2].tolist()
        return values | by_bin("train/loss_t", totals, counts)


def by_bin(prefix: str, totals: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """The means of those bins of time that have samples."""
    bins = enumerate(zip(totals, counts, strict=True))
    return {f"{prefix}{k / TIME_BINS:.1f}": total / count for k, (total, count) in bins if count}

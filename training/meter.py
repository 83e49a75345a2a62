"""The figures of a run's curve: losses, REPA cosines and speeds between two log lines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.step import TIME_BINS, Report


class Meter:
    """Adds up this rank's steps between two log lines; `read` adds the ranks up."""

    def __init__(self, device: torch.device) -> None:
        self.steps = self.reports = self.images = 0
        # Loss, 2 cosines, losses by bin, counts by bin; images that could not be decoded, and captions that were cut.
        # They stay on the device, as reading them back stalls a step.
        self.sums = torch.zeros(5 + 2 * TIME_BINS, dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)  # steps whose gradient was finite
        self.waited = 0.0
        self.aligned = False

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
            self.aligned = report.alignment is not None
            cosines = report.alignment or (torch.zeros_like(report.loss),) * 2
            means = torch.stack([value.float() for value in (report.loss, *cosines)])
            values = torch.cat([means, report.loss_by_time.float(), report.count_by_time.float()])
            self.sums[:-2] += torch.where(finite, values, 0.0)
            self.sums[-2] += report.unreadable
            self.sums[-1] += report.truncated

    def read(self, ranks: int, seconds: float, rate: float) -> dict[str, float]:
        """The means over steps and ranks so far; every rank must call it. The loss is NaN where no step was taken."""
        sums, taken = self.sums, int(self.taken)
        if ranks > 1:
            sums = sums.clone()
            torch.distributed.all_reduce(sums)
        loss, matched, shuffled = (sums[:3] / (taken * self.reports * ranks)).tolist()
        values: dict[str, float] = {
            "train/loss": loss,
            "train/grad_norm": float(self.grad_norm) / max(1, taken),
            "train/lr": rate,
            "perf/images_per_second": self.images * ranks / seconds,
            "perf/data_wait": self.waited / seconds,
            "data/unreadable": float(sums[-2]),
            "data/truncated_captions": float(sums[-1]),
        }
        if taken < self.steps:
            values["train/skipped_steps"] = self.steps - taken
        if self.aligned:
            values |= {"repa/cosine": matched, "repa/cosine_shuffled": shuffled}
        totals, counts = sums[3 : 3 + TIME_BINS].tolist(), sums[3 + TIME_BINS : -2].tolist()
        return values | by_bin("train/loss_t", totals, counts)


def by_bin(prefix: str, totals: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """The means of those bins of time that have samples."""
    bins = enumerate(zip(totals, counts, strict=True))
    return {f"{prefix}{k / TIME_BINS:.1f}": total / count for k, (total, count) in bins if count}

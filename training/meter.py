"""The figures of a run's curve: losses, REPA cosines and speeds between two log lines."""

from __future__ import annotations

import torch

from training.step import TIME_BINS, Report


class Meter:
    """Adds up this rank's steps between two log lines; `read` adds the ranks up."""

    def __init__(self) -> None:
        self.steps = self.reports = self.images = 0
        self.sums = torch.zeros(3 + 2 * TIME_BINS, dtype=torch.float64)  # loss, 2 cosines, losses by bin, counts by bin
        self.grad_norm = self.waited = 0.0
        self.aligned = False

    def add(self, reports: list[Report], grad_norm: float, waited: float) -> None:
        self.steps += 1
        self.grad_norm += grad_norm
        self.waited += waited
        for report in reports:
            self.reports += 1
            self.images += report.images
            self.aligned = report.alignment is not None
            cosines = report.alignment or (torch.zeros(()), torch.zeros(()))
            means = torch.stack([value.float().cpu() for value in (report.loss, *cosines)])
            self.sums += torch.cat([means, report.loss_by_time.float().cpu(), report.count_by_time.float().cpu()])

    def read(self, ranks: int, seconds: float, rate: float) -> dict[str, float]:
        """The means over steps and ranks so far; every rank must call it."""
        sums = self.sums
        if ranks > 1:
            sums = sums.cuda() if torch.distributed.get_backend() == "nccl" else sums.clone()
            torch.distributed.all_reduce(sums)
        loss, matched, shuffled = (sums[:3] / (self.reports * ranks)).tolist()
        values: dict[str, float] = {
            "train/loss": loss,
            "train/grad_norm": self.grad_norm / self.steps,
            "train/lr": rate,
            "train/images_per_second": self.images * ranks / seconds,
            "data/wait_share": self.waited / seconds,
        }
        if self.aligned:
            values |= {"repa/cosine": matched, "repa/cosine_shuffled": shuffled}
        totals, counts = sums[3 : 3 + TIME_BINS].tolist(), sums[3 + TIME_BINS :].tolist()
        for k, (total, count) in enumerate(zip(totals, counts, strict=True)):
            if count:
                values[f"train/loss_t{k / TIME_BINS:.1f}"] = total / count
        return values

"""The loss on held-out samples: always the same samples, captions, noise and times.

The loss of training falls also where a network learns its samples by heart, and it swings with the times that each step
draws. This one does neither. Its times are spread evenly, so that runs which draw theirs in another way compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from infra.config import Settings, operational
from training.diffusion.draws import Draw, draw
from training.engine import Engine
from training.loader.batches import Batch, Batches
from training.meter import by_bin
from training.step import Preparer

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo one, are spread evenly however many there are


class ValidationSettings(Settings):
    every: int = operational(0, ge=0, description="steps between validations; a multiple of log_every; 0: none")
    batches: int = operational(4, ge=1, description="of held-out samples, which are kept in memory")


class Validation:
    """A rank's share of the batches, which is read once; the encoders' features are computed each time."""

    def __init__(self, batches: Batches, count: int, prepare: Preparer) -> None:
        self.prepare = replace(prepare, vision=None)  # representation alignment is no part of this loss
        self.batches: list[Batch] = [batches.read(number * batches.batch) for number in range(count)]

    def losses(self, engine: Engine) -> dict[str, float]:
        """The loss, and that of each bin of time, over all ranks; every rank must call it."""
        micro = (part for batch in self.batches for part in batch.split(engine.micro_batch))
        reports = engine.evaluate(map(self.prepare, micro))
        sums = torch.stack([torch.stack([report.loss_by_time, report.count_by_time]) for report in reports])
        sums = sums.double().sum(0)
        if engine.ranks > 1:
            torch.distributed.all_reduce(sums)
        totals, counts = sums.tolist()
        return {"val/loss": sum(totals) / max(1.0, sum(counts)), **by_bin("val/loss_t", totals, counts)}


def draw_evenly(
    seed: int, positions: Sequence[int], shape: tuple[int, ...], *, bits_BN: torch.Tensor | None = None
) -> Draw:
    """As in training, but with times spread evenly over all positions, and no caption dropped."""
    drawn = draw(seed, positions, shape, drop=0.0, bits_BN=bits_BN)
    times = np.modf((np.asarray(positions, dtype=np.float64) + 0.5) * _GOLDEN)[0]
    return drawn._replace(t_B=torch.from_numpy(times.astype(np.float32)))

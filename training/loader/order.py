"""The global order of samples, which does not depend on the number of ranks.

    position p  ->  epoch, lane = p mod L, index in the lane  ->  a row of the selection

In each epoch the shards are permuted, their rows are concatenated and cut into L lanes of equal length, and each lane
is shuffled in windows. A lane covers few shards, and a rank reads only the lanes p = rank (mod ranks), so it fetches
only its share of the corpus. As the lanes are fixed, four ranks together read the same rows as one would.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from infra.config import Settings, operational
from infra.errors import DataError


class DataSettings(Settings):
    lanes: int = Field(64, ge=1, description="fixed lanes of the global order; a multiple of every rank count used")
    window: int = Field(8192, ge=1, description="rows of a lane that are shuffled together")
    prefetch: int = operational(4, ge=1, description="batches read ahead")


class Order:
    """position -> row, by arithmetic and two permutations: of an epoch's shards and of a window, kept while in use."""

    def __init__(self, rows_per_shard: np.ndarray, seed: int, settings: DataSettings) -> None:
        self.rows_per_shard = rows_per_shard
        self.first_row = np.concatenate([[0], np.cumsum(rows_per_shard)])[:-1]
        self.seed, self.window = seed, settings.window
        total = int(rows_per_shard.sum())
        self.lanes = min(settings.lanes, total)
        self.lane_length = total // self.lanes if total else 0
        if not self.lane_length:
            raise DataError("the snapshot has no rows to train on", remedy="loosen its filter, or prepare more data")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int, int], np.ndarray] = {}

    @property
    def epoch_length(self) -> int:
        """Rows of an epoch. Up to lanes - 1 rows are left out, different ones in each epoch's permutation."""
        return self.lanes * self.lane_length

    def row(self, position: int) -> int:
        epoch, within = divmod(position, self.epoch_length)
        lane_index, lane = divmod(within, self.lanes)
        window, offset = divmod(lane_index, self.window)
        index = lane * self.lane_length + window * self.window + int(self._window(epoch, lane, window)[offset])
        shards, starts = self._epoch(epoch)
        k = int(np.searchsorted(starts, index, side="right")) - 1
        return int(self.first_row[shards[k]] + index - starts[k])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the index at which each begins when their rows are concatenated."""
        if epoch not in self._epochs:
            self._epochs = {e: v for e, v in self._epochs.items() if e >= epoch - 1}
            shards = generator(self.seed, epoch).permutation(len(self.rows_per_shard))
            starts = np.concatenate([[0], np.cumsum(self.rows_per_shard[shards])])[:-1]
            self._epochs[epoch] = (shards, starts)
        return self._epochs[epoch]

    def _window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        key = (epoch, lane, window)
        if key not in self._windows:
            self._windows = {k: v for k, v in self._windows.items() if k[1] != lane}
            size = min(self.window, self.lane_length - window * self.window)
            self._windows[key] = generator(self.seed, epoch, lane, window).permutation(size)
        return self._windows[key]


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

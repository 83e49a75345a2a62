"""The global order of samples, which does not depend on the number of ranks, and the order in which shards are fetched.

    position p  ->  epoch, lane = p mod L, index in the lane  ->  a row of the selection

In each epoch the shards are permuted, their rows are concatenated and cut into L lanes of equal length, and each lane
is shuffled in windows. A lane covers few shards, and a rank reads only the lanes p = rank (mod ranks), so it fetches
only its share of the corpus. As the lanes are fixed, four ranks together read the same rows as one would.

The first window of a lane is shortened, by the more the higher the lane's number. So the lanes of a rank open their
windows one after another, and not all at once, which would fetch all of their shards at once.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from infra.config import Settings, operational
from infra.errors import DataError

FETCHES_A_SHARD = 4  # a shard's fetch may begin whenever a rank has read a quarter of a shard


class DataSettings(Settings):
    lanes: int = Field(96, ge=1, description="fixed lanes of the global order; a multiple of every rank count used")
    window: int = Field(8192, ge=1, description="rows of a lane that are shuffled together")
    prefetch: int = operational(4, ge=1, description="batches read ahead")
    threads: int | None = operational(
        None, ge=0, description="of a rank, which read and decode; none: its share of the machine's cores; 0: as asked"
    )
    cache: Path | None = operational(
        None, description="folder for fetched shards, shared by a machine's ranks and kept; none: a temporary one"
    )
    cache_gb: float = operational(100.0, gt=0, description="the cache's bound; above it the least used shards go")


class Order:
    """position -> row, by arithmetic and two permutations: of an epoch's shards and of a window, kept while in use."""

    def __init__(
        self,
        rows_per_shard: np.ndarray,
        seed: int,
        settings: DataSettings,
        *,
        first_row: np.ndarray | None = None,
        stream: tuple[int, ...] = (),
    ) -> None:
        """`first_row`: each shard's first row in the selection, if other rows lie between. Orders of several streams
        permute shards alike, and windows in different ways."""
        self.rows_per_shard, self.stream = rows_per_shard, stream
        in_a_row = np.concatenate([[0], np.cumsum(rows_per_shard)])[:-1]
        self.first_row = in_a_row if first_row is None else first_row
        self.seed, self.window = seed, settings.window
        self.total = int(rows_per_shard.sum())
        self.lanes = min(settings.lanes, self.total)
        self.lane_length = self.total // self.lanes if self.total else 0
        if not self.lane_length:
            raise DataError("the snapshot has no rows to train on", remedy="loosen its filter, or prepare more data")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self._lock = threading.RLock()

    @property
    def epoch_length(self) -> int:
        """Rows of an epoch. Up to lanes - 1 rows are left out, different ones in each epoch's permutation."""
        return self.lanes * self.lane_length

    def row(self, position: int) -> int:
        epoch, within = divmod(position, self.epoch_length)
        index_in_lane, lane = divmod(within, self.lanes)
        window = (index_in_lane + self.skipped(lane)) // self.window
        start, end = self.bounds(lane, window)
        with self._lock:
            shuffled = self._window(epoch, lane, window, end - start)
            index = lane * self.lane_length + start + int(shuffled[index_in_lane - start])
            shards, starts = self._epoch(epoch)
        k = int(np.searchsorted(starts, index, side="right")) - 1
        return int(self.first_row[shards[k]] + index - starts[k])

    def shard(self, row: int) -> int:
        return int(np.searchsorted(self.first_row, row, side="right")) - 1

    def bounds(self, lane: int, window: int) -> tuple[int, int]:
        """The indices in a lane at which a window begins and ends; both are the lane's length behind its last one."""
        start = window * self.window - self.skipped(lane)
        return max(0, min(start, self.lane_length)), min(start + self.window, self.lane_length)

    def shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        """The shards whose rows a window holds."""
        start, end = (lane * self.lane_length + bound for bound in self.bounds(lane, window))
        with self._lock:
            shards, starts = self._epoch(epoch)
        first, last = np.searchsorted(starts, [start, end - 1], side="right") - 1
        return [int(shard) for shard in shards[first : last + 1] if self.rows_per_shard[shard]]

    def skipped(self, lane: int) -> int:
        """The rows by which a lane's first window is shorter: evenly spread over the lanes of each rank, and of all."""
        return self.window * lane // self.lanes

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the index at which each begins when their rows are concatenated."""
        if epoch not in self._epochs:
            self._epochs = {e: v for e, v in self._epochs.items() if abs(e - epoch) < 2}
            shards = generator(self.seed, epoch).permutation(len(self.rows_per_shard))
            starts = np.concatenate([[0], np.cumsum(self.rows_per_shard[shards])])[:-1]
            self._epochs[epoch] = (shards, starts)
        return self._epochs[epoch]

    def _window(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        kept, shuffled = self._windows.get((epoch, lane), (-1, None))
        if kept != window or shuffled is None:
            shuffled = generator(self.seed, epoch, lane, window, *self.stream).permutation(size)
            self._windows.pop((epoch - 1, lane), None)
            self._windows[epoch, lane] = (window, shuffled)
        return shuffled


class Fetching:
    """Tells a rank which shards to begin to fetch while it reads on.

    A shard is due once a lane is within one window of the rows that are in it. Those due are begun in the order of
    need, and so few for the samples that were read that neither the start of a run, nor a resume, nor a new epoch asks
    for many at once. What is read before its shard is there is read from the store by range.
    """

    def __init__(self, order: Order, rank: int, ranks: int, position: int) -> None:
        self.order = order
        own = order.lanes % ranks == position % ranks == 0  # else a rank's positions wander through all lanes
        lanes = range(rank, order.lanes, ranks) if own else range(order.lanes)
        self._due: list[tuple[int, int, int]] = []  # index in all epochs of a lane, lane, shard
        self._ahead: list[tuple[int, int, int]] = []  # the next window of each lane: its start, lane, number
        self._last: dict[int, list[int]] = {}  # lane -> shards of its window before
        index = position // order.lanes
        epoch, within = divmod(index, order.lane_length)
        for lane in lanes:
            window = (within + order.skipped(lane)) // order.window
            self._ahead.append((epoch * order.lane_length + order.bounds(lane, window)[0], lane, window))
        heapq.heapify(self._ahead)
        self._gap = ranks * max(1.0, order.total / max(1, len(order.rows_per_shard)) / FETCHES_A_SHARD)
        self._next, self._asked = position + self._gap, position  # when the next may begin; what was asked for before

    def until(self, position: int) -> Iterator[int]:
        """The shards to begin before the samples up to `position`, counted over all ranks, are read."""
        # Where a lane is shorter than a window, that would be many epochs: a small corpus is asked for once in each.
        self._look_ahead(position // self.order.lanes + min(self.order.window, self.order.lane_length))
        while self._due and self._next <= position:
            _, _, shard = heapq.heappop(self._due)
            self._next = max(self._next, self._asked) + self._gap
            yield shard
        self._asked = position

    def _look_ahead(self, index: int) -> None:
        order = self.order
        while self._ahead[0][0] <= index:
            start, lane, window = heapq.heappop(self._ahead)
            epoch = start // order.lane_length
            shards = order.shards_of(epoch, lane, window)
            for shard in shards:
                if shard not in self._last.get(lane, ()):
                    heapq.heappush(self._due, (start, lane, shard))
            self._last[lane] = shards
            end = order.bounds(lane, window)[1]
            window = window + 1 if end < order.lane_length else 0
            heapq.heappush(self._ahead, (epoch * order.lane_length + end, lane, window))


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

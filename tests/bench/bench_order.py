"""How the global order asks for shards: bytes that a rank fetches before and within steps, without any image.

9,000 shards of 5,000 rows are the 45 million images of a large run. The order and the schedule of fetches are the real
ones; a shard counts as fetched once its fetch begins, and a sample whose shard had not begun before its batch counts as
read by range. A node's cache holds a tenth of the corpus, and forgets what was used least recently.

    python -m tests.bench.bench_order [--ranks 16] [--batch 1024] [--shards 9000]
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from training.loader.order import DataSettings, Fetching, Order

BYTES = {256: 40e3, 512: 132e3}  # of an image, JPEG 95
PER_NODE = 8  # ranks that share a cache


@dataclass
class Node:
    """A cache of a number of shards, which its ranks share."""

    room: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def use(self, shard: int) -> bool:
        """Whether the shard is there."""
        if shard in self.held:
            self.held.move_to_end(shard)
            return True
        return False

    def take(self, shard: int) -> None:
        self.held[shard] = None
        if len(self.held) > self.room:
            self.held.popitem(last=False)


@dataclass
class Rank:
    """What a rank has fetched: in rows, one count for each step."""

    steps: list[int] = field(default_factory=list)
    by_range: int = 0
    used: int = 0


def begin(rows: int, rank: int, options: argparse.Namespace) -> float:
    """GB of 512 px images that a rank reads for its first batch, in units of rows: by range, as no shard is there."""
    return rows


def simulate(options: argparse.Namespace, epochs: float) -> list[Rank]:
    """Steps of all ranks in turn; each position's shard is looked up for every `sampled`-th step."""
    settings = DataSettings()
    order = Order(np.full(options.shards, options.rows), 0, settings)
    nodes = [Node(options.shards // 10) for _ in range(-(-options.ranks // PER_NODE))]
    ranks = [Rank() for _ in range(options.ranks)]
    fetchings = [Fetching(order, rank, options.ranks, 0) for rank in range(options.ranks)]
    for position in range(0, int(epochs * order.epoch_length), options.batch):
        for number, (rank, fetching) in enumerate(zip(ranks, fetchings, strict=True)):
            node, fetched = nodes[number // PER_NODE], 0
            before = set(node.held) if position == 0 else None
            for shard in fetching.until(position + options.batch):
                if not node.use(shard):
                    node.take(shard)
                    fetched += options.rows
            by_range = 0
            for p in range(position + number, position + options.batch, options.ranks):
                shard = shard_at(order, p)
                if (before is not None and shard not in before) or not node.use(shard):
                    by_range += 1
            rank.steps.append(fetched + by_range)
            rank.by_range += by_range
            rank.used += options.batch // options.ranks
    return ranks


def shard_at(order: Order, position: int) -> int:
    """The shard of a position, without the shuffling in its window: a row of the same window stands for it.

    Forty million permuted rows would take an hour. The rows of a window are spread over its shards alike.
    """
    epoch, within = divmod(position, order.epoch_length)
    index, lane = divmod(within, order.lanes)
    start, end = order.bounds(lane, (index + order.skipped(lane)) // order.window)
    spread = start + (index - start) * 4567 % (end - start)
    shards, starts = order._epoch(epoch)
    return int(shards[np.searchsorted(starts, lane * order.lane_length + spread, side="right") - 1])

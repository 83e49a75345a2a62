"""How the global order asks for shards: bytes that a rank fetches before and within its steps, without any image.

9,000 shards of 5,000 rows are the 45 million images of a large run. Order and schedule of fetches are the real ones. A
shard counts as fetched when its fetch begins; what its window reads before that counts as read by range. Ranks of a
node share a cache of a tenth of the corpus, which forgets what was used least recently.

    python -m tests.bench.bench_order [--ranks 16] [--batch 1024] [--shards 9000]
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from training.loader.order import DataSettings, Fetching, Order

GB_AN_IMAGE = {256: 40e-6, 512: 132e-6}  # JPEG 95
A_NODE = 8  # ranks that share a cache
EXACT = 800  # steps that are followed sample by sample: a window's length, from the start and from the second epoch


@dataclass
class Node:
    """A cache of a number of shards."""

    room: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)
    lost: int = 0  # shards that were forgotten while a lane read from them

    def fetch(self, shard: int, in_use: set[int]) -> bool:
        """Whether the shard had to be fetched."""
        new = shard not in self.held
        self.held[shard] = None
        self.held.move_to_end(shard)
        for other in in_use & self.held.keys():
            self.held.move_to_end(other)
        if len(self.held) > self.room:
            self.lost += self.held.popitem(last=False)[0] in in_use
        return new


class Rank:
    def __init__(self, order: Order, number: int, options: argparse.Namespace, position: int = 0) -> None:
        self.order, self.number, self.options = order, number, options
        self.fetching = Fetching(order, number, options.ranks, position)
        self.fetched: list[int] = []  # the steps at which it began to fetch a shard
        self.began: dict[int, int] = {}  # shard -> the position at which the rank first asked for it

    def begins(self, position: int) -> list[int]:
        shards = list(self.fetching.until(position + self.options.batch))
        for shard in shards:
            self.began.setdefault(shard, position)
        return shards


def two_epochs(order: Order, options: argparse.Namespace) -> tuple[list[Rank], list[Node]]:
    ranks = [Rank(order, number, options) for number in range(options.ranks)]
    nodes = [Node(options.shards // 10) for _ in range(-(-options.ranks // A_NODE))]
    for step, position in enumerate(range(0, 2 * order.epoch_length, options.batch)):
        for rank in ranks:
            for shard in rank.begins(position):
                members = ranks[rank.number // A_NODE * A_NODE :][:A_NODE]
                in_use = {s for member in members for last in member.fetching._last.values() for s in last}
                if nodes[rank.number // A_NODE].fetch(shard, in_use):
                    rank.fetched.append(step)
    return ranks, nodes


def step_by_step(order: Order, options: argparse.Namespace, start: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Shards begun and samples read by range in each step of the first and the last rank; the worse of both."""
    shards, samples = np.zeros((2, steps)), np.zeros((2, steps))
    for place, number in enumerate((0, options.ranks - 1)):
        rank = Rank(order, number, options, start)
        for step in range(steps):
            position = start + step * options.batch
            before = set(rank.began)
            shards[place, step] = len(rank.begins(position))
            for p in range(position + number, position + options.batch, options.ranks):
                samples[place, step] += order.shard(order.row(p)) not in before
    return shards, samples


def most_within(values: np.ndarray, steps: int) -> float:
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), 1)
    return float((sums[:, steps:] - sums[:, :-steps]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=9000)
    parser.add_argument("--rows", type=int, default=5000)
    options = parser.parse_args()
    order = Order(np.full(options.shards, options.rows), 0, DataSettings())
    print(f"{order.total:,} rows, {options.ranks} ranks, batch {options.batch}, {order.lanes} lanes")
    print(f"an epoch leaves out {order.total - order.epoch_length} rows")
    show_steps(order, options)
    ranks, nodes = two_epochs(order, options)
    whole = sum(len(rank.fetched) for rank in ranks) * options.rows
    print(f"fetched / used over two epochs           {whole / (2 * order.epoch_length):.3f} in whole shards")
    most = max(int(np.bincount(rank.fetched, minlength=10).max()) for rank in ranks)
    ten = max(np.convolve(np.bincount(rank.fetched, minlength=10), np.ones(10)).max() for rank in ranks)
    print(f"shards a rank begins, most in a step     {most}, within ten steps {ten:.0f}")
    print(f"shards forgotten while in use            {sum(node.lost for node in nodes)}")


def show_steps(order: Order, options: argparse.Namespace) -> None:
    for name, start in (("start", 0), ("resume at 50 %", order.epoch_length // 2)):
        start -= start % options.batch
        shards, samples = step_by_step(order, options, start, EXACT)
        images = shards * options.rows + samples
        by_range = samples.sum() / (2 * EXACT * options.batch / options.ranks)
        print(f"{name}: {by_range:.0%} of the first {EXACT} steps' samples are read by range")
        for size, gb in GB_AN_IMAGE.items():
            first, ten = samples[:, 0].max() * gb, most_within(images, 10) * gb
            print(f"  {size} px: GB before the first step {first:.4f}, most within ten steps {ten:.2f}")


if __name__ == "__main__":
    main()

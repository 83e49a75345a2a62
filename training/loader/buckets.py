"""The order of samples of several sizes: each global batch is of one bucket, whose images have one size.

    position  ->  number of the batch  ->  its bucket, and how many batches of it came before  ->  rows of the bucket

Each bucket has an order of its own rows. All of them permute the shards alike in an epoch, cut as many lanes, and
shuffle windows that hold the same share of their rows. So they read about the same shards at about the same time.

Batches are dealt out to the buckets in proportion to their rows: the k-th batch of a bucket with a share s of all rows
is due at the time (k + 1/2) / s, and batches follow each other as they are due. So the number of batches of each bucket
before a position follows from the shares alone. A bucket's epoch need not end with a batch: its next epoch fills it up,
and nothing is left over.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from infra.errors import DataError
from training.loader.order import DataSettings, Order


class Orders:
    """The orders of all buckets, and which of them a batch is of. One bucket alone is read as if there were none."""

    def __init__(self, rows_SK: np.ndarray, seed: int, settings: DataSettings, batch: int) -> None:
        """`rows_SK`: the rows of each shard and bucket; in the selection they lie in this order."""
        total, self.batch = int(rows_SK.sum()), batch
        if not total:
            raise DataError("the snapshot has no rows to train on", remedy="loosen its filter, or prepare more data")
        first_SK = np.concatenate([[0], np.cumsum(rows_SK)])[:-1].reshape(rows_SK.shape)
        self.of: list[Order] = []
        for bucket, rows_S in enumerate(rows_SK.T):
            window = max(1, round(settings.window * int(rows_S.sum()) / total))
            own = settings.model_copy(update={"window": window})
            stream = () if rows_SK.shape[1] == 1 else (bucket,)
            self.of.append(Order(rows_S, seed, own, first_row=first_SK[:, bucket], stream=stream))
        self.total = total
        self.epoch_length = sum(order.epoch_length for order in self.of)

    def find(self, position: int) -> tuple[int, int]:
        """The bucket of the batch that begins at `position`, and how many samples of that bucket came before."""
        if len(self.of) == 1:
            return 0, position
        number, rest = divmod(position, self.batch)
        assert not rest, "with several buckets, a batch begins where another would"
        before = self.dealt(number)
        bucket = min(range(len(before)), key=lambda k: self._due(k, before[k]))
        return bucket, before[bucket] * self.batch

    def dealt(self, batches: int) -> list[int]:
        """How many of the first batches are of each bucket."""
        # Those due until the time at which so many are due on average; then some more or fewer of the nearest.
        counts = [(2 * batches * o.epoch_length + self.epoch_length) // (2 * self.epoch_length) for o in self.of]
        while (surplus := sum(counts) - batches) > 0:
            counts[max((k for k, n in enumerate(counts) if n), key=lambda k: self._due(k, counts[k] - 1))] -= 1
        for _ in range(-surplus):
            counts[min(range(len(counts)), key=lambda k: self._due(k, counts[k]))] += 1
        return counts

    def _due(self, bucket: int, number: int) -> tuple[Fraction, int]:
        """When a bucket's batch of that number is due, in epochs and batches; of those due together, the first bucket's
        comes first."""
        return Fraction(2 * number + 1, self.of[bucket].epoch_length), bucket

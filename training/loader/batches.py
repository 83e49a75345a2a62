"""A rank's share of every global batch, read ahead in a thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from infra.errors import DataError
from training.loader.order import DataSettings, Order
from training.loader.reader import Reader


@dataclass(frozen=True)
class Batch:
    images_BCHW: torch.Tensor  # uint8
    captions: list[str]
    positions: np.ndarray

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.captions), size):
            micro = slice(start, start + size)
            yield Batch(self.images_BCHW[micro], self.captions[micro], self.positions[micro])


class Batches:
    def __init__(
        self, reader: Reader, settings: DataSettings, *, batch: int, rank: int = 0, ranks: int = 1, seed: int = 0
    ) -> None:
        self.reader, self.order = reader, Order(reader.rows_per_shard, seed, settings)
        self.batch, self.rank, self.ranks, self.prefetch = batch, rank, ranks, settings.prefetch

    def read(self, position: int) -> Batch:
        positions = np.arange(position + self.rank, position + self.batch, self.ranks)
        rows = [self.order.row(int(p)) for p in positions]
        images = [self.reader.image(row) for row in rows]
        if len({image.shape for image in images}) > 1:
            raise DataError(
                "the snapshot's images are of several sizes", remedy="train on a square size, not on buckets"
            )
        captions = [self.reader.caption(row, int(p)) for row, p in zip(rows, positions, strict=True)]
        images_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return Batch(images_BCHW, captions, positions)

    def iterate(self, position: int) -> Generator[Batch]:
        """Endless batches from `position` on; close it to stop the thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: list[Future[Batch]] = []
            try:
                while True:
                    while len(ahead) < self.prefetch:
                        ahead.append(pool.submit(self.read, position))
                        position += self.batch
                    yield ahead.pop(0).result()
            finally:
                for future in ahead:
                    future.cancel()

"""A snapshot as an endless, ordered stream of batches, the same whatever number of ranks reads it.

    position p  ->  epoch, lane = p mod L, index in the lane  ->  a row of the selection

An epoch's order: the shards are permuted, their rows laid end to end and cut into L lanes of equal length, and each
lane is shuffled in windows. A lane touches few shards, so a rank that reads only the lanes p = rank (mod ranks) fetches
only its share of the corpus; and since the lanes are fixed, four ranks see what one would. The whole state of reading
is one integer, the number of samples consumed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from PIL import Image
from pydantic import Field

from infra.config import Settings, operational
from infra.errors import DataError
from infra.records import fetch_named
from infra.store import Store


class DataSettings(Settings):
    lanes: int = Field(64, ge=1, description="fixed lanes of the global order; a multiple of every rank count used")
    window: int = Field(8192, ge=1, description="rows of a lane that are shuffled together")
    prefetch: int = operational(4, ge=1, description="batches read ahead")


@dataclass(frozen=True)
class Batch:
    images_BCHW: torch.Tensor  # uint8
    captions: list[str]
    positions: np.ndarray

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self.captions), size):
            part = slice(start, start + size)
            yield Batch(self.images_BCHW[part], self.captions[part], self.positions[part])


class Order:
    """The global order: position -> row, by arithmetic and two small permutations; nothing is stored but one epoch."""

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
        """Up to lanes - 1 rows are left out of an epoch; the next one's permutation leaves out others."""
        return self.lanes * self.lane_length

    def row(self, position: int) -> int:
        epoch, within = divmod(position, self.epoch_length)
        index, lane = divmod(within, self.lanes)
        window, offset = divmod(index, self.window)
        place = lane * self.lane_length + window * self.window + int(self._window(epoch, lane, window)[offset])
        shards, starts = self._epoch(epoch)
        k = int(np.searchsorted(starts, place, side="right")) - 1
        return int(self.first_row[shards[k]] + place - starts[k])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            self._epochs = {e: v for e, v in self._epochs.items() if e >= epoch - 1}
            shards = _generator(self.seed, epoch).permutation(len(self.rows_per_shard))
            starts = np.concatenate([[0], np.cumsum(self.rows_per_shard[shards])])[:-1]
            self._epochs[epoch] = (shards, starts)
        return self._epochs[epoch]

    def _window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        key = (epoch, lane, window)
        if key not in self._windows:
            self._windows = {k: v for k, v in self._windows.items() if k[1] != lane}
            size = min(self.window, self.lane_length - window * self.window)
            self._windows[key] = _generator(self.seed, epoch, lane, window).permutation(size)
        return self._windows[key]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _decoded(data: bytes) -> np.ndarray:
    """A shard's image, which prepare wrote in one of three formats: it is RGB, upright and of its size."""
    if data.startswith(b"\xff\xd8"):
        image_HWC: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return image_HWC
    with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
        return np.array(image.convert("RGB"))


class Reader:
    """Rows of a selection as images and captions. Tars are fetched whole once, held against their hashes, and then read
    in ranges."""

    def __init__(self, store: Store, selection: pa.Table, cache: Path, seed: int) -> None:
        self.store, self.cache, self.seed = store, cache, seed
        tars = selection["tar"].combine_chunks()
        tars = tars if isinstance(tars, pa.DictionaryArray) else tars.dictionary_encode()
        self.tar_names: list[str] = tars.dictionary.to_pylist()
        self.tar_of_row = tars.indices.to_numpy()
        self.offsets = selection["offset"].to_numpy()
        self.lengths = selection["length"].to_numpy()
        self.captions = selection["captions"]
        self.weights = selection["caption_weights"]
        self._files: dict[int, Any] = {}
        if np.any(np.diff(self.tar_of_row) < 0):
            raise DataError("the selection's rows are not in the order of their shards", remedy="make it anew")

    @property
    def rows_per_shard(self) -> np.ndarray:
        return np.bincount(self.tar_of_row, minlength=len(self.tar_names))

    def image(self, row: int) -> np.ndarray:
        """[H,W,3] uint8."""
        file = self._file(int(self.tar_of_row[row]))
        file.seek(int(self.offsets[row]))
        data = file.read(int(self.lengths[row]))
        try:
            return _decoded(data)
        except (ValueError, OSError) as error:
            tar = self.tar_names[int(self.tar_of_row[row])]
            raise DataError(f"row {row} of {tar} is no image ({error})", remedy="run `pixnerd data verify`") from None

    def caption(self, row: int, position: int) -> str:
        """One of the row's captions, drawn by weight anew for every position."""
        texts = self.captions[row].as_py()
        weights = np.asarray(self.weights[row].as_py(), dtype=np.float64)
        draw = _generator(self.seed, position, 1).random() * weights.sum()
        return str(texts[int(np.searchsorted(np.cumsum(weights), draw, side="right"))])

    def _file(self, tar: int) -> Any:
        if tar not in self._files:
            path = self.cache / self.tar_names[tar].replace("/", "_")
            if not path.exists():
                fetch_named(self.store, self.tar_names[tar], path)
            self._files[tar] = path.open("rb")
        return self._files[tar]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class Batches:
    """This rank's share of every global batch, from `position` on, read ahead in one thread."""

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
        images_BHWC = np.stack(images)
        captions = [self.reader.caption(row, int(p)) for row, p in zip(rows, positions, strict=True)]
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()
        return Batch(images_BCHW, captions, positions)

    def iterate(self, position: int) -> Iterator[Batch]:
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

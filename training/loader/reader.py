"""Reads rows of a selection as images and captions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from PIL import Image

from infra.errors import DataError
from infra.store import Store
from training.loader.cache import Tars
from training.loader.order import generator


class Reader:
    def __init__(self, store: Store, selection: pa.Table, cache: Path, seed: int) -> None:
        self.seed, self.tars = seed, Tars(store, cache)
        tars = selection["tar"].combine_chunks()
        tars = tars if isinstance(tars, pa.DictionaryArray) else tars.dictionary_encode()
        self.tar_names: list[str] = tars.dictionary.to_pylist()
        self.tar_of_row = tars.indices.to_numpy()
        self.offsets = selection["offset"].to_numpy()
        self.lengths = selection["length"].to_numpy()
        self.captions = selection["captions"]
        self.weights = selection["caption_weights"]
        if np.any(np.diff(self.tar_of_row) < 0):
            raise DataError("the selection's rows are not in the order of their shards", remedy="make it anew")

    @property
    def rows_per_shard(self) -> np.ndarray:
        return np.bincount(self.tar_of_row, minlength=len(self.tar_names))

    def image(self, row: int) -> np.ndarray:
        """[H, W, 3] uint8."""
        tar = self.tar_names[int(self.tar_of_row[row])]
        data = self.tars.read(tar, int(self.offsets[row]), int(self.lengths[row]))
        try:
            return _decoded(data)
        except (ValueError, OSError) as error:
            raise DataError(f"row {row} of {tar} is no image ({error})", remedy="run `pixnerd data verify`") from None

    def caption(self, row: int, position: int) -> str:
        """One of the row's captions, drawn with their weights from (seed, position): another epoch may draw another."""
        texts = self.captions[row].as_py()
        weights = np.asarray(self.weights[row].as_py(), dtype=np.float64)
        draw = generator(self.seed, position, 1).random() * weights.sum()
        return str(texts[int(np.searchsorted(np.cumsum(weights), draw, side="right"))])

    def close(self) -> None:
        self.tars.close()


def _decoded(data: bytes) -> np.ndarray:
    """An image of a shard, which `prepare` has written as JPEG, PNG or WebP, upright and of its final size."""
    if data.startswith(b"\xff\xd8"):
        import simplejpeg  # where no image is a JPEG, training needs no JPEG library

        return cast(np.ndarray, simplejpeg.decode_jpeg(data, colorspace="RGB"))
    with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
        return np.array(image.convert("RGB"))

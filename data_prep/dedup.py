"""Exact duplicates over the indexes: the same pixels, however the files were stored.

Of every group one survives, and always the same one: the largest original, then the smallest key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

COLUMNS = ("key", "pixels_sha256", "original_width", "original_height")


def duplicates(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """For each row (COLUMNS of an index), whether another one survives in its place. Rejected inputs are neither."""
    found = np.zeros(rows.num_rows, bool)
    accepted = np.flatnonzero(rows["pixels_sha256"].is_valid().to_numpy())
    rows = rows.take(accepted)
    area = rows["original_width"].to_numpy().astype(np.int64) * rows["original_height"].to_numpy()
    hashes = _hashes(rows["pixels_sha256"])
    keys = rows["key"].to_numpy(zero_copy_only=False).astype("S")
    order = np.lexsort((keys, -area, *hashes.T))
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    found[accepted[order[1:][same]]] = True
    return found


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """(rows, 4) words of each sha256: as sortable numbers, since numpy drops the zero bytes at the end of strings."""
    words = column.combine_chunks()
    if not len(words):
        return np.zeros((0, 4), "<u8")
    return np.frombuffer(words.buffers()[1], "<u8").reshape(-1, 4)[words.offset :][: len(words)]

"""What a training run needs, made here: a shard of synthetic pictures with its snapshot, and random encoders.

Nothing is downloaded, and only what training itself imports is used: the rest of the pipeline need not be installed.
"""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist
from PIL import Image

from infra import layout
from infra.config import parse
from infra.records import SnapshotRecord, put_data
from infra.shards import SELECTION_SCHEMA, TarWriter, parquet_bytes
from infra.store import FileStore, Store
from infra.tracking import NOWHERE
from tests.gpu.encoders import CAPTIONS
from training.job import Job
from training.settings import TrainSettings

ROWS = 128


def start_rank(device: str) -> None:
    """A world of one rank, which meets itself in a file: no port, no network. It lasts as long as this process.

    DeepSpeed keeps groups of the first world that it sees, and would look for them in a second one.
    """
    if dist.is_initialized():
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    folder = tempfile.mkdtemp(prefix="pixnerd-meeting-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)


def write_data(store: Store, folder: Path, size: int) -> SnapshotRecord:
    """A snapshot of one shard, as `prepare` and `snapshot` would leave it."""
    path, rows = folder / "shard.tar", []
    with path.open("wb") as file:
        tar = TarWriter(file)
        for number in range(ROWS):
            key = f"{number:020x}"
            rows.append((key, tar.add(f"{key}.png", _picture(number, size))))
        tar.finish()
    name = put_data(store, layout.IMAGES.at(size=str(size)), "00000.tar", path).key
    table = pa.Table.from_pylist(
        [
            {"key": key, "tar": name, "offset": member.offset, "length": member.length, "width": size, "height": size}
            | {"captions": [CAPTIONS[number % len(CAPTIONS)]], "caption_weights": [1.0]}
            | {"source": "synthetic", "bucket": f"{size}x{size}"}
            for number, (key, member) in enumerate(rows)
        ],
        schema=SELECTION_SCHEMA,
    )
    selection = put_data(store, layout.SELECTIONS.at(), "synthetic.parquet", parquet_bytes(table))
    return SnapshotRecord(
        shards="synthetic",
        size=str(size),
        selection=selection,
        held_out=selection,
        by_shard=selection,
        rows=ROWS,
        held_out_rows=0,
        counts=[("accepted", ROWS)],
        by_source={"synthetic": [ROWS]},
        caption_shares={},
        forgotten=[],
    )


def _picture(number: int, size: int) -> bytes:
    """A bright square on a slope, as a PNG: lossless, and read without a JPEG library."""
    slope = np.linspace(0, 200, size, dtype=np.uint8)
    pixels = np.stack([np.tile(slope, (size, 1)), np.tile(slope[:, None], (1, size)), np.full((size, size), 60)], -1)
    at = number * size // (2 * ROWS)
    pixels[at : at + size // 2, at : at + size // 2] = (37 * number % 256, 255 - number, 128)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def job(store: FileStore, folder: Path, snapshot: SnapshotRecord, name: str, settings: dict[str, Any]) -> Job:
    """A run; `folder` holds the encoders."""
    return Job(
        store=store,
        prefix=f"training/{name}",
        digest=name,
        settings=parse(TrainSettings, settings),
        snapshot=snapshot,
        text=str(folder / "text"),
        vision=str(folder / "vision"),
        start_from=None,
        run=NOWHERE,
        scratch=folder,
    )

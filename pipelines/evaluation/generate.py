"""Pictures of prompts, drawn by Ray tasks: each task draws a chunk of prompts and stores it as one tar of PNGs.

Picture i of a prompt starts from seed i. So the pictures do not depend on how many workers draw them, and two
checkpoints are compared on the same noise.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.pool import Work, results
from infra.records import CheckpointRecord, DataObject, get_data, put_data
from infra.shards import TarWriter
from infra.store import Store
from training import checkpoint as checkpoints
from training.sampling import Artist, SampleSettings


def generate(
    store: Store,
    folder: str,
    checkpoint: CheckpointRecord,
    prompts: Sequence[str],
    images: int,
    settings: SampleSettings,
    show: Callable[[int, int], None],
) -> list[DataObject]:
    """Draw `images` pictures of each prompt. Returns a tar for each chunk, in the order of the prompts."""
    chunk = max(1, settings.batch // images)
    starts = range(0, len(prompts), chunk)
    drawing = _Drawing(store, folder, checkpoint, prompts, images, chunk, settings)
    tars: dict[int, DataObject] = {}
    for start, tar in results(drawing):
        tars[start] = tar
        show(len(tars), len(starts))
    return [tars[start] for start in starts]


class _Drawing(Work[int, DataObject]):
    """The chunks of prompts as work for Ray; a chunk is called by the number of its first prompt."""

    noun = "batches of pictures"

    def __init__(
        self,
        store: Store,
        folder: str,
        checkpoint: CheckpointRecord,
        prompts: Sequence[str],
        images: int,
        chunk: int,
        settings: SampleSettings,
    ) -> None:
        super().__init__(range(0, len(prompts), chunk))
        self._target = store, folder, checkpoint
        self._prompts, self._images, self._chunk, self._settings = prompts, images, chunk, settings

    def begin(self) -> None:
        import ray

        super().begin()
        self._draw = ray.remote(num_cpus=1, max_retries=1)(_draw_chunk)

    def start(self, piece: int, again: bool) -> Any:
        return self._draw.remote(
            *self._target, piece, list(self._prompts[piece : piece + self._chunk]), self._images, self._settings
        )

    def name(self, piece: int) -> str:
        return f"the batch of pictures from prompt {piece}"


def _draw_chunk(
    store: Store,
    folder: str,
    checkpoint: CheckpointRecord,
    first: int,
    prompts: list[str],
    images: int,
    settings: SampleSettings,
) -> DataObject:
    """Draw a chunk and store it; runs in a Ray worker."""
    from PIL import Image

    artist = _artist(store, checkpoint, settings)
    repeated = [prompt for prompt in prompts for _ in range(images)]
    pictures = artist.draw(repeated, list(range(images)) * len(prompts), settings)
    packed = io.BytesIO()
    tar = TarWriter(packed)
    for index, picture in enumerate(pictures):
        prompt, image = divmod(index, images)
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        tar.add(f"{first + prompt:05d}-{image}.png", png.getvalue())
    tar.finish()
    return put_data(store, folder, f"{first:05d}.tar", packed.getvalue())


_loaded: dict[tuple[str, SampleSettings], Artist] = {}  # at most one: a worker draws many chunks with one checkpoint


def _artist(store: Store, checkpoint: CheckpointRecord, settings: SampleSettings) -> Artist:
    import torch

    key = checkpoint.digest(), settings
    if key in _loaded:
        return _loaded[key]
    _loaded.clear()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # a Ray task has one CPU
    with tempfile.TemporaryDirectory(prefix=f"pixnerd-{os.getpid()}-") as folder:
        _loaded[key] = Artist.load(checkpoints.fetch(store, checkpoint, Path(folder)), device, settings)
    return _loaded[key]


def read_pictures(store: Store, tars: Sequence[DataObject]) -> dict[tuple[int, int], bytes]:
    """(number of the prompt, number of its image) -> the PNG."""
    pngs = {}
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(get_data(store, data))) as tar:
            for member in tar:
                file = tar.extractfile(member)
                prompt, _, image = Path(member.name).stem.partition("-")
                if file is not None:
                    pngs[int(prompt), int(image)] = file.read()
    return pngs

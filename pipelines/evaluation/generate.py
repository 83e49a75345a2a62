"""Pictures of prompts, drawn by Ray tasks: each task draws a chunk of prompts and stores it as one tar of PNGs.

Picture i of a prompt starts from seed i. So the pictures do not depend on how many workers draw them, and two
checkpoints are compared on the same noise.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infra.errors import SettingsError
from infra.pool import Work, results
from infra.records import CheckpointRecord, DataObject, get_data, put_data
from infra.shards import TarWriter
from infra.store import Store
from training import checkpoint as checkpoints
from training.sampling import Artist, SampleSettings

Show = Callable[[str, int, int], None]  # a text, how much is done, of how much


class Resources(NamedTuple):
    """What a drawing task asks Ray for, and how many of them run at once; None for twice the cluster's CPUs."""

    cpus: float = 1
    gpus: float = 0
    at_once: int | None = None


class Order(NamedTuple):
    """What is drawn of each of some prompts, where the pictures go, and with what they are drawn."""

    store: Store
    folder: str
    checkpoint: CheckpointRecord
    images: int  # pictures of each prompt
    settings: SampleSettings
    resources: Resources = Resources()


def generate(order: Order, prompts: Sequence[str], show: Show) -> list[DataObject]:
    """Draw the pictures of each prompt. Returns a tar for each chunk, in the order of the prompts."""
    size = max(1, order.settings.batch // order.images)
    chunks = {first: prompts[first : first + size] for first in range(0, len(prompts), size)}
    tars: dict[int, DataObject] = {}
    for first, tar in results(_Drawing(order, chunks)):
        tars[first] = tar
        show(f"{len(tars)} of {len(chunks)} batches of pictures", len(tars), len(chunks))
    return [tars[first] for first in chunks]


class _Drawing(Work[int, DataObject]):
    """The chunks of prompts as work for Ray; a chunk is called by the number of its first prompt."""

    noun = "batches of pictures"

    def __init__(self, order: Order, chunks: Mapping[int, Sequence[str]]) -> None:
        super().__init__(chunks, order.resources.at_once)
        self._order, self._chunks = order, chunks

    def begin(self) -> None:
        import ray

        super().begin()
        cpus, gpus, _ = self._order.resources
        self._draw = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_draw_chunk)

    def start(self, piece: int, again: bool) -> Any:
        return self._draw.remote(self._order, piece, self._chunks[piece])

    def name(self, piece: int) -> str:
        return f"the batch of pictures from prompt {piece}"


def _draw_chunk(order: Order, first: int, prompts: Sequence[str]) -> DataObject:
    """Draw a chunk and store it; runs in a Ray worker."""
    from PIL import Image

    images = order.images
    artist = _artist(order.store, order.checkpoint, order.settings)
    repeated = [subject for prompt in prompts for subject in [_subject(artist, prompt)] * images]
    pictures = artist.draw(repeated, list(range(images)) * len(prompts), order.settings)
    packed = io.BytesIO()
    tar = TarWriter(packed)
    for index, picture in enumerate(pictures):
        prompt, image = divmod(index, images)
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        tar.add(f"{first + prompt:05d}-{image}.png", png.getvalue())
    tar.finish()
    return put_data(order.store, order.folder, f"{first:05d}.tar", packed.getvalue())


def _subject(artist: Artist, prompt: str) -> str | int:
    """A prompt as it is, or the label that it names if the network draws from labels."""
    if artist.text is not None:
        return prompt
    classes = artist.net.config.classes
    if not (prompt.isascii() and prompt.isdigit() and int(prompt) < classes):
        raise SettingsError(
            f"{prompt[:60]!r} is no label, and this network draws from labels",
            remedy=f"give numbers from 0 to {classes - 1} as prompts",
        )
    return int(prompt)


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

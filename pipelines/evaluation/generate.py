"""Pictures of prompts, drawn chunk by chunk by a pool of actors that keep the network loaded (see `chunks`).

Picture i of a prompt starts from seed i. So the pictures do not depend on how many workers draw them, and two
checkpoints are compared on the same noise.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from infra import layout
from infra.actors import Needs
from infra.causes import first_line
from infra.errors import SettingsError
from infra.layout import Place
from infra.records import CheckpointRecord, DataObject, get_data
from infra.shards import TarWriter
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Made, Maker, Shelf, Show, make
from training import checkpoint as checkpoints
from training.sampling import Artist, SampleSettings, pixels

PICTURES = "pictures"  # what a chunk calls its tar of <prompt>-<image>.png


class DrawingSettings(SampleSettings):
    """Sampling settings in which the batch counts: other batches may round a pixel in another way."""

    batch: int = Field(32, ge=1, description="images at once; a chunk of prompts is drawn in one batch")


class Order(NamedTuple):
    """What is drawn of each of some prompts, where the pictures go, and with what they are drawn."""

    store: Store
    stage: str
    checkpoint: CheckpointRecord
    images: int  # pictures of each prompt
    settings: DrawingSettings
    needs: Needs = Needs()
    place: Place = layout.DRAWN


def generate(order: Order, prompts: Sequence[str], show: Show) -> list[Chunk]:
    """Draw the pictures of each prompt. Returns the chunks in the order of the prompts."""
    drawing = _Drawing(order.store, order.checkpoint, order.images, order.settings)
    asked = chunked(prompts, order.images, order.settings)
    return make(Shelf(order.store, order.place, order.stage), drawing, asked, order.needs, show)


class Asked(NamedTuple):
    """The prompts of a chunk, the first of which has this number."""

    first: int
    prompts: tuple[str, ...]

    def pictures(self, images: int) -> list[str]:
        return [f"{self.first + n:05d}-{image}" for n in range(len(self.prompts)) for image in range(images)]


def chunked(prompts: Sequence[str], images: int, settings: DrawingSettings) -> dict[int, Asked]:
    """The number of a chunk's first prompt -> the chunk."""
    size = max(1, settings.batch // images)
    return {first: Asked(first, tuple(prompts[first : first + size])) for first in range(0, len(prompts), size)}


def place(name: str) -> tuple[int, int]:
    """The number of the prompt and of its picture, by the picture's name."""
    prompt, _, image = name.partition("-")
    return int(prompt), int(image)


class _Drawing(Maker[Asked]):
    noun = "batches of pictures"

    def __init__(self, store: Store, checkpoint: CheckpointRecord, images: int, settings: DrawingSettings) -> None:
        self.store, self.checkpoint, self.images, self.settings = store, checkpoint, images, settings

    def load(self, device: str) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)  # an actor has one CPU
        with tempfile.TemporaryDirectory(prefix="pixnerd-draw-") as folder:
            self.artist = Artist.load(
                checkpoints.fetch(self.store, self.checkpoint, Path(folder)), device, self.settings
            )

    def pictures(self, item: Asked) -> list[str]:
        return item.pictures(self.images)

    def make(self, item: Asked) -> Made:
        from PIL import Image

        subjects = [subject for prompt in item.prompts for subject in [_subject(self.artist, prompt)] * self.images]
        x_BCHW = self.artist.solve(subjects, list(range(self.images)) * len(item.prompts), self.settings)
        finite = x_BCHW.isfinite().flatten(1).all(1).tolist()
        packed = io.BytesIO()
        tar, failed = TarWriter(packed), {}
        for name, picture, whole in zip(self.pictures(item), pixels(x_BCHW.nan_to_num()), finite, strict=True):
            if not whole:
                failed[name] = "it came out as NaN or infinity"
                continue
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            tar.add(f"{name}.png", png.getvalue())
        tar.finish()
        return Made({f"{PICTURES}.tar": packed.getvalue()}, failed)


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


def tars(chunks: Iterable[Chunk]) -> list[DataObject]:
    return [chunk.data[PICTURES] for chunk in chunks if PICTURES in chunk.data]


class ToJudge(NamedTuple):
    """A chunk's pictures, for makers that look at them."""

    tar: DataObject
    names: list[str]  # of all pictures that the chunk should have
    failed: dict[str, str]  # those of them that were not drawn

    @property
    def there(self) -> list[str]:
        return [name for name in self.names if name not in self.failed]

    def read(self, store: Store) -> Iterator[tuple[str, npt.NDArray[np.uint8] | str]]:
        """Each picture that should be there [H, W, 3], or why it cannot be read."""
        from PIL import Image

        pngs = read_pictures(store, [self.tar])
        for name in self.there:
            try:
                with Image.open(io.BytesIO(pngs[place(name)])) as picture:
                    yield name, np.asarray(picture.convert("RGB"))
            except KeyError:
                yield name, "it is missing"
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                yield name, f"it cannot be read ({first_line(error)})"


def read_pictures(store: Store, tars: Sequence[DataObject]) -> dict[tuple[int, int], bytes]:
    """(number of the prompt, number of its image) -> the PNG."""
    pngs = {}
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(get_data(store, data))) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    pngs[place(Path(member.name).stem)] = file.read()
    return pngs

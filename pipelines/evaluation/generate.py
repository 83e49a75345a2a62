"""Pictures of prompts, drawn chunk by chunk by a pool of actors that keep the network loaded (see `chunks`).

Picture i of a prompt starts from seed i, or every picture from a seed of its own. So the pictures do not depend on how
many workers draw them, and two checkpoints are compared on the same noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from infra import layout
from infra.actors import Needs
from infra.errors import SettingsError
from infra.layout import Place
from infra.records import CheckpointRecord
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Made, Maker, Shelf, Show, make
from pipelines.evaluation.tars import PICTURES, ToJudge, packed, png_of
from training import checkpoint as checkpoints
from training.sampling import Artist, SampleSettings, pixels


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
    apart: bool = False  # every picture has its own noise; else picture i of each prompt starts from seed i


def generate(order: Order, prompts: Sequence[str], show: Show) -> list[Chunk]:
    """Draw the pictures of each prompt. Returns the chunks in the order of the prompts."""
    drawing = Drawing(order.store, order.checkpoint, order.images, order.settings, order.apart)
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


def to_look_at(asked: Mapping[int, Asked], images: int, drawn: Sequence[Chunk]) -> dict[int, ToJudge]:
    """The number of each chunk's first prompt -> its pictures, as far as there are any."""
    return {
        first: ToJudge(chunk.data[PICTURES], prompts.pictures(images), chunk.failed)
        for (first, prompts), chunk in zip(asked.items(), drawn, strict=True)
        if PICTURES in chunk.data
    }


class Drawing(Maker[Asked]):
    noun = "batches of pictures"

    def __init__(
        self, store: Store, checkpoint: CheckpointRecord, images: int, settings: DrawingSettings, apart: bool = False
    ) -> None:
        self.store, self.checkpoint, self.images, self.settings = store, checkpoint, images, settings
        self.apart = apart

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
        subjects = [subject for prompt in item.prompts for subject in [_subject(self.artist, prompt)] * self.images]
        first = item.first * self.images
        seeds = range(first, first + len(subjects)) if self.apart else [*range(self.images)] * len(item.prompts)
        x_BCHW = self.artist.solve(subjects, list(seeds), self.settings)
        finite = x_BCHW.isfinite().flatten(1).all(1).tolist()
        pngs, failed = dict[str, bytes](), dict[str, str]()
        for name, picture, whole in zip(self.pictures(item), pixels(x_BCHW.nan_to_num()), finite, strict=True):
            if not whole:
                failed[name] = "it came out as NaN or infinity"
                continue
            pngs[f"{name}.png"] = png_of(picture)
        return packed(pngs, failed)


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

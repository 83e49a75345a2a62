"""Pictures that a checkpoint draws for held-out captions, each beside the original picture that has the caption.

They are to be looked at; no score is made of them. The record says where in the shards the originals are.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from pydantic import Field, model_validator

from infra import layout
from infra.actors import Needs
from infra.config import Settings
from infra.errors import CheckpointError, NotFound
from infra.records import CheckpointRecord, DataObject, Plain, Record, SnapshotRecord, read_record, recorded
from infra.shards import read_selection
from infra.store import Store
from pipelines.evaluation.chunks import Show
from pipelines.evaluation.generate import DrawingSettings, Order, generate
from pipelines.evaluation.rows import likeliest_caption, spread
from pipelines.evaluation.tars import read_pictures, tars
from pipelines.pictures import sheet


class DrawSettings(Settings):
    count: int = Field(8, ge=0, le=1000, description="how many captions of the data's held-out samples are drawn")
    prompts: list[str] = Field([], description="prompts of one's own, drawn before those")
    images: int = Field(4, ge=1, le=100, description="pictures a prompt, from seeds 0, 1, ...")
    sampling: DrawingSettings = DrawingSettings()

    @model_validator(mode="after")
    def _draws_something(self) -> DrawSettings:
        if not self.count and not self.prompts:
            raise ValueError("nothing is drawn: give `prompts`, or a `count` of captions")
        return self


class Original(Plain):
    """Where the picture lies that has the caption: these bytes of a shard's tar."""

    tar: str
    offset: int
    length: int


class Prompt(Plain):
    text: str
    original: Original | None = None


class Drawn(Record):
    checkpoint: str  # digest of its record
    prompts: list[Prompt]
    seen: bool  # whether training saw these captions, as it does if the snapshot holds nothing out
    images: int
    tars: list[DataObject]  # of PNGs, <prompt>-<image>.png


def draw(
    store: Store,
    stage: str,
    checkpoint: CheckpointRecord,
    data: SnapshotRecord,
    settings: DrawSettings,
    show: Show,
    needs: Needs = Needs(),
) -> Drawn:
    key = layout.SAMPLES.at(stage=stage)
    if store.exists(key):
        return read_record(store, key, Drawn)
    prompts = [*(Prompt(text=text) for text in settings.prompts), *_captions(store, data, settings.count)]
    order = Order(store, stage, checkpoint, settings.images, settings.sampling, needs, layout.SAMPLING)
    chunks = generate(order, [prompt.text for prompt in prompts], show)
    for name, cause in (missing for chunk in chunks for missing in chunk.failed.items()):
        raise CheckpointError(
            f"the picture {name} could not be drawn: {cause}",
            remedy="use shift, guidance and steps nearer to the defaults, or precision fp32",
        )
    drawn = Drawn(
        checkpoint=checkpoint.digest(),
        prompts=prompts,
        seen=not data.held_out_rows,
        images=settings.images,
        tars=tars(chunks),
    )
    return recorded(store, key, drawn)


def _captions(store: Store, data: SnapshotRecord, count: int) -> list[Prompt]:
    """The likeliest captions of samples that are spread evenly over the data, no text twice.

    Of data that are made for training by labels, these are the labels.
    """
    rows = read_selection(store, data, held_out=data.held_out_rows > 0)
    prompts: dict[str, Prompt] = {}
    for number in spread(rows.num_rows):
        if len(prompts) >= count:
            break
        [row] = rows.slice(number, 1).to_pylist()
        text = str(row["label"]) if "label" in row else likeliest_caption(row)
        original = Original(tar=row["tar"], offset=row["offset"], length=row["length"])
        prompts.setdefault(text, Prompt(text=text, original=original))
    return list(prompts.values())


def pictures(store: Store, drawn: Drawn, most: int | None = None) -> list[tuple[Prompt, bytes | None, list[bytes]]]:
    """Up to `most` prompts, each with its original (None if it has none or it is gone) and what was drawn for it."""
    pngs = read_pictures(store, drawn.tars)
    return [
        (prompt, _original(store, prompt.original), [pngs[number, image] for image in range(drawn.images)])
        for number, prompt in enumerate(drawn.prompts[:most])
    ]


def _original(store: Store, at: Original | None) -> bytes | None:
    try:
        return None if at is None else store.get(at.tar, at.offset, at.offset + at.length)
    except NotFound:
        return None


def write_sheet(store: Store, drawn: Drawn, title: str, path: Path) -> None:
    """One contact sheet with as many of the prompts as fit, as a file beside the page."""
    original_name = "training" if drawn.seen else "held out"
    rows = []
    for prompt, original, pngs in pictures(store, drawn):
        named = [(original_name, original)] if original else []
        named += [(f"seed {image}", png) for image, png in enumerate(pngs)]
        rows.append(sheet.Row(prompt.text, [data for _, data in named], [name for name, _ in named]))
    with Image.open(io.BytesIO(pngs[-1])) as picture:
        size = picture.height, picture.width
    about = f"{len(rows)} captions, {drawn.images} pictures of each" + (
        "; on the left the picture that has the caption" if any(p.original for p in drawn.prompts) else ""
    )
    next(sheet.sheets(title, about, rows, sheet.Layout.of(rows, size))).save(path, "PNG")

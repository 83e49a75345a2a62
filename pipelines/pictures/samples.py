"""A contact sheet of prepared samples chosen at random: a grid, each with a caption, its source and its size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data_prep.prepare.plan import all_shards, read_plan
from data_prep.sources.reading import in_order
from infra.records import ShardRecord
from infra.shards import read_index
from infra.store import Store
from infra.text import cut, printable
from pipelines.pictures.sheet import GREY, INK, MARGIN, PAPER, scaled
from pipelines.pictures.text import font, wrap

SIDES = ("original_width", "original_height", "width", "height")
CELL, GAP, FONT, CAPTION_LINES = 192, 14, 13, 3
UNREADABLE = "#c8553d"


class _Cell(NamedTuple):
    image: bytes
    caption: str
    about: str


def contact_sheet(
    store: Store, plan: str, edition: str, size: str, path: Path, *, count: int = 40, seed: int = 0, columns: int = 8
) -> int:
    """Write a sheet of random samples, the same for the same seed, and return how many are on it."""
    shards = [shard for shard in all_shards(store, read_plan(store, plan, edition), size) if shard.accepted]
    ends = np.cumsum([shard.accepted for shard in shards])
    total = int(ends[-1]) if shards else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    shard_of = np.searchsorted(ends, chosen, side="right")
    # A shard, and its samples' places counted from its end, so negative.
    work = [(shards[k], (chosen[shard_of == k] - ends[k]).tolist()) for k in np.unique(shard_of)]
    cells = [cell for of_shard in in_order(lambda args: _cells(store, *args), work) for cell in of_shard]
    title = f"{len(cells)} of {total:,} samples · size {printable(size)} · plan {plan}"
    _sheet(cells, columns, title).save(path, "PNG")
    return len(cells)


def _cells(store: Store, shard: ShardRecord, places: Sequence[int]) -> list[_Cell]:
    assert shard.tar is not None
    table = read_index(store, shard, ["accepted", "source", "offset", "length", "captions", *SIDES])
    table = table.filter(table["accepted"])
    cells = []
    for row in table.take([table.num_rows + place for place in places]).to_pylist():
        image = store.get(shard.tar.key, row["offset"], row["offset"] + row["length"])
        sides = f"{row['width']}x{row['height']} of {row['original_width']}x{row['original_height']}"
        text = row["captions"][0]["text"] if row["captions"] else ""
        cells.append(_Cell(image, cut(text or "", 400), f"{cut(row['source'], 14)} · {sides}"))
    return cells


def _sheet(cells: Sequence[_Cell], columns: int, title: str) -> Image.Image:
    rows = max(1, -(-len(cells) // columns))
    step = CELL + 8 + (CAPTION_LINES + 1) * (FONT + 4) + GAP
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + 34 + rows * step - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, font(18))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (CELL + GAP), MARGIN + 34 + row * step
        picture = _picture(cell.image)
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        y += CELL + 8
        pen.text((x, y), wrap(cell.about, font(FONT - 2), CELL, 1)[0], GREY, font(FONT - 2))
        for line, text in enumerate(wrap(cell.caption, font(FONT), CELL, CAPTION_LINES), start=1):
            pen.text((x, y + line * (FONT + 4)), text, INK, font(FONT))
    return sheet


def _picture(data: bytes) -> Image.Image:
    """The image as large as its cell allows; a red square if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "WEBP", "PNG")) as picture:
            scale = CELL / max(picture.size)
            return scaled(picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", (CELL, CELL), UNREADABLE)

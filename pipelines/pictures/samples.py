"""A sheet of prepared samples, drawn at random, each with a caption, its source and its size."""

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
from infra.text import printable
from pipelines.pictures.text import font, short, wrap

SIDES = ("original_width", "original_height", "width", "height")
TABLE, INK, MUTED, UNREADABLE = "#ececf0", "#1b1b1f", "#7a7a84", "#c8553d"  # a white picture must show its edge
CELL, GAP, MARGIN, FONT = 192, 14, 28, 13
TEXT_LINES = 3  # of a caption


class _Cell(NamedTuple):
    image: bytes
    caption: str
    about: str


def contact_sheet(
    store: Store, plan: str, edition: str, size: str, path: Path, *, count: int = 40, seed: int = 0, columns: int = 8
) -> int:
    """A sheet of samples drawn at random, the same ones for the same seed; the number of samples on it."""
    shards = [shard for shard in all_shards(store, read_plan(store, plan, edition), size) if shard.accepted]
    ends = np.cumsum([shard.accepted for shard in shards])
    total = int(ends[-1]) if shards else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    shard_of = np.searchsorted(ends, chosen, side="right")
    work = [(shards[k], (chosen[shard_of == k] - ends[k]).tolist()) for k in np.unique(shard_of)]  # from the end
    cells = [cell for found in in_order(lambda one: _cells(store, *one), work) for cell in found]
    _sheet(cells, columns, f"{len(cells)} of {total:,} samples · size {printable(size)} · plan {plan}").save(
        path, "PNG"
    )
    return len(cells)


def _cells(store: Store, shard: ShardRecord, places: Sequence[int]) -> list[_Cell]:
    assert shard.tar is not None
    names = [*("accepted", "source", "offset", "length", "captions"), *SIDES]
    table = read_index(store, shard, names)
    table = table.filter(table["accepted"])
    cells = []
    for row in table.take([table.num_rows + place for place in places]).to_pylist():
        image = store.get(shard.tar.key, row["offset"], row["offset"] + row["length"])
        sides = f"{row['width']}x{row['height']} of {row['original_width']}x{row['original_height']}"
        text = row["captions"][0]["text"] if row["captions"] else ""
        cells.append(_Cell(image, short(text or "", 400), f"{short(row['source'], 14)} · {sides}"))
    return cells


def _sheet(cells: Sequence[_Cell], columns: int, title: str) -> Image.Image:
    rows = max(1, -(-len(cells) // columns))
    step = CELL + 8 + (TEXT_LINES + 1) * (FONT + 4) + GAP
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + 34 + rows * step - GAP), TABLE)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, font(18))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (CELL + GAP), MARGIN + 34 + row * step
        picture = _picture(cell.image)
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        y += CELL + 8
        pen.text((x, y), wrap(cell.about, font(FONT - 2), CELL, 1)[0], MUTED, font(FONT - 2))
        for line, text in enumerate(wrap(cell.caption, font(FONT), CELL, TEXT_LINES), start=1):
            pen.text((x, y + line * (FONT + 4)), text, INK, font(FONT))
    return sheet


def _picture(data: bytes) -> Image.Image:
    """As large as its cell; a red one where it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "WEBP", "PNG")) as found:
            scale = CELL / max(found.size)
            size = max(1, round(found.width * scale)), max(1, round(found.height * scale))
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            return found.convert("RGB").resize(size, how)
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", (CELL, CELL), UNREADABLE)

"""A contact sheet of prepared samples chosen at random, each with a caption, its source and its size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.prepare.plan import all_shards, read_plan
from data_prep.sources.reading import in_order
from infra.records import ShardRecord
from infra.shards import read_index
from infra.store import Store
from infra.text import cut, printable
from pipelines.pictures import sheet

SIDES = ("original_width", "original_height", "width", "height")
CELL = 192  # the room for a picture, in pixels


class _Cell(NamedTuple):
    """The order is that of the fields of `sheet.Row`."""

    image: bytes
    about: str
    caption: str


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
    title = f"{len(cells)} of {total:,} samples of size {printable(size)}"
    row = sheet.Row(f"plan {plan}", *zip(*cells, strict=True)) if cells else sheet.Row(f"plan {plan}", [], [])
    layout = sheet.Layout.grid(columns, (CELL, CELL))
    next(sheet.sheets(title, f"chosen with the seed {seed}", [row], layout)).save(path, "PNG")
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
        cells.append(_Cell(image, f"{cut(row['source'], 14)} · {sides}", cut(text or "", 400)))
    return cells

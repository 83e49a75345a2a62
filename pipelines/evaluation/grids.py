"""Pictures in a folder as DPG-Bench's script reads them: <item_id>.png, a 2 x 2 grid of an item's pictures.

The first picture is on the upper left, the second beside it. Of a single picture the file is no grid, but the picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from infra import layout
from infra.causes import first_line
from infra.config import digest
from infra.errors import EvaluationError
from infra.files import appearing, sha256_of
from infra.records import EvalReport
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Made, Shelf
from pipelines.evaluation.generate import Asked
from pipelines.evaluation.tars import packed, png_of, read_pictures

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")  # of other kinds, a stranger's file could make Pillow run other programs
_BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's errors of broken files


class Grids(NamedTuple):
    """A folder of grids whose pictures have `resolution` pixels a side."""

    folder: Path
    items: Sequence[str]
    images: int  # pictures of each item
    resolution: int

    def digest(self) -> str:
        """A digest of the bytes of all grids."""
        files = {item: self._file(item) for item in self.items}
        return digest({item: sha256_of(file) for item, file in files.items() if file is not None})

    def taken(self, store: Store, stage: str, chunks: Mapping[int, Asked]) -> list[Chunk]:
        """Their pictures in chunks, as if they had been drawn; one that is not there is counted."""
        if all(self._file(item) is None for item in self.items):
            raise EvaluationError(
                f"{self.folder} holds no pictures of these items",
                remedy=f"name each grid after its item, such as {self.items[0]}.png",
            )
        shelf = Shelf(store, layout.DRAWN, stage)
        return [shelf.put(first, self._packed(asked), "a folder") for first, asked in chunks.items()]

    def _packed(self, asked: Asked) -> Made:
        pictures, missing = dict[str, bytes](), dict[str, str]()
        for number in range(asked.first, asked.first + len(asked.prompts)):
            cut = self._cut(self.items[number])
            for image in range(self.images):
                if isinstance(cut, str):
                    missing[f"{number:05d}-{image}"] = cut
                else:
                    pictures[f"{number:05d}-{image}.png"] = cut[image]
        return packed(pictures, missing)

    def _cut(self, item: str) -> list[bytes] | str:
        """The grid's pictures, or why there are none."""
        file = self._file(item)
        if file is None:
            return "its grid is not in the folder"
        side = self.resolution * (1 if self.images == 1 else 2)
        try:
            with Image.open(file, formats=_FORMATS) as grid:
                if grid.size != (side, side):
                    return f"its grid is {grid.width} x {grid.height}, not {side} x {side}"
                return [
                    png_of(np.asarray(grid.convert("RGB").crop(box))) for box in _boxes(self.images, self.resolution)
                ]
        except _BROKEN as error:
            return f"its grid cannot be read ({first_line(error).replace(str(file), file.name)})"

    def _file(self, item: str) -> Path | None:
        files = (self.folder / f"{item}{suffix}" for suffix in _SUFFIXES)
        return next((file for file in files if file.is_file()), None)


def laid_out(store: Store, report: EvalReport, items: Sequence[str], images: int, folder: Path) -> int:
    """Write a report's pictures as grids, one tar after the other; returns how many.

    A picture that is missing stays black in its grid; an item of which all are missing has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for tar in report.pictures:
        of_item: dict[int, dict[int, bytes]] = {}
        for (number, image), data in read_pictures(store, [tar]).items():
            of_item.setdefault(number, {})[image] = data
        for number, pictures in of_item.items():
            with appearing(folder / f"{items[number]}.png") as path:
                _grid(pictures, images).save(path, "PNG")
        count += len(of_item)
    return count


def _grid(pictures: Mapping[int, bytes], images: int) -> Image.Image:
    opened = {number: Image.open(io.BytesIO(data)).convert("RGB") for number, data in pictures.items()}
    side = max(next(iter(opened.values())).size)
    grid = Image.new("RGB", (side, side) if images == 1 else (2 * side, 2 * side))
    for number, (left, top, _, _) in enumerate(_boxes(images, side)):
        if number in opened:
            grid.paste(opened[number], (left, top))
    return grid


def _boxes(images: int, side: int) -> list[tuple[int, int, int, int]]:
    corners = ((0, 0), (side, 0), (0, side), (side, side))
    return [(left, top, left + side, top + side) for left, top in corners[:images]]

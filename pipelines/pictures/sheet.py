"""The contact sheet: a row for each prompt, a column for each seed, small enough to be looked at in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from pipelines.pictures.text import font, wrap

PAPER, INK, GREY, RULE = "#f1f1f3", "#1b1b1f", "#6b6b73", "#d9d9de"  # a white picture must show its edge
MARGIN, GAP = 36, 10
WIDTH = 1800  # pixels for the pictures of a row
MOST_COLUMNS = 12  # more seeds than that stand in several lines
CELLS = (112, 384)  # least and most long side of a picture that is scaled down
SMALL = 192  # up to which smaller pictures are enlarged, by whole factors, so that their pixels can be seen
NARROWEST = 640  # room for words
TALLEST = 9000  # of a sheet; what does not fit goes on the next one
LINES = 3  # of a caption
NAME, BELOW = 24, 14  # pixels for a picture's name, and below a row


class Row(NamedTuple):
    caption: str
    pictures: list[Path]
    names: list[str]  # one below each picture


class Layout(NamedTuple):
    columns: int
    cell: tuple[int, int]  # width, height
    width: int

    @classmethod
    def of(cls, rows: Sequence[Row], size: tuple[int, int]) -> Layout:
        """For pictures of this height and width."""
        most = max(len(row.pictures) for row in rows)
        columns = _shared(most, _shared(most, MOST_COLUMNS))  # lines of the same length
        room = (WIDTH - GAP * (columns - 1)) // columns
        cell = _cell(size, min(max(room, CELLS[0]), CELLS[1]))
        return cls(columns, cell, max(NARROWEST, columns * (cell[0] + GAP) - GAP) + 2 * MARGIN)


def _shared(number: int, among: int) -> int:
    """The larger share."""
    return -(-number // among)


def _cell(size: tuple[int, int], most: int) -> tuple[int, int]:
    height, width = size
    long = max(height, width)
    scale = most / long if long > most else max(1, min(SMALL, most) // long)
    return max(1, round(width * scale)), max(1, round(height * scale))


def sheets(title: str, about: str, rows: Sequence[Row], size: tuple[int, int]) -> Iterator[Image.Image]:
    """As many as it takes; no more pictures are held than one sheet shows."""
    layout = Layout.of(rows, size)
    head = _Head(title, about, layout)
    page: list[_Band] = []
    for band in (_Band(part, layout) for row in rows for part in _split(row, layout, TALLEST - head.height)):
        if page and head.height + sum(b.height for b in page) + band.height > TALLEST:
            yield _drawn(head, page, layout)
            page = []
        page.append(band)
    yield _drawn(head, page, layout)


def _split(row: Row, layout: Layout, height: int) -> Iterator[Row]:
    """A row that would be taller, as several with the same caption."""
    lines = (height - _Band(row, layout).words - BELOW) // (layout.cell[1] + NAME)
    most = max(1, lines) * layout.columns
    for start in range(0, len(row.pictures), most):
        part = slice(start, start + most)
        yield Row(row.caption, row.pictures[part], row.names[part])


def _drawn(head: _Head, bands: Sequence[_Band], layout: Layout) -> Image.Image:
    image = Image.new("RGB", (layout.width, head.height + sum(band.height for band in bands) + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(image)
    head.draw(pen)
    top = head.height
    for band in bands:
        band.draw(image, pen, top)
        top += band.height
    return image


class _Head:
    """What was drawn with, and how."""

    def __init__(self, title: str, about: str, layout: Layout) -> None:
        width = layout.width - 2 * MARGIN
        self.title = wrap(title, font(24, bold=True), width, lines=1)
        self.about = wrap(about, font(14), width, lines=LINES)
        self.height = MARGIN + 34 + 20 * len(self.about) + 14

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        pen.text((MARGIN, MARGIN - 6), self.title[0], INK, font(24, bold=True))
        _lines(pen, self.about, MARGIN + 30, 20, GREY, font(14))


class _Band:
    """One prompt and its pictures, in as many lines as they need."""

    def __init__(self, row: Row, layout: Layout) -> None:
        self.row, self.layout = row, layout
        self.caption = wrap(row.caption, font(18), layout.width - 2 * MARGIN, lines=LINES)
        self.words = 14 + 25 * len(self.caption) + 8
        lines = _shared(len(row.pictures), layout.columns)
        self.height = self.words + lines * (layout.cell[1] + NAME) + BELOW

    def draw(self, image: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        pen.line((MARGIN, top, self.layout.width - MARGIN, top), RULE)
        _lines(pen, self.caption, top + 12, 25, INK, font(18))
        width, height = self.layout.cell
        for number, (path, name) in enumerate(zip(self.row.pictures, self.row.names, strict=True)):
            line, column = divmod(number, self.layout.columns)
            x, y = MARGIN + column * (width + GAP), top + self.words + line * (height + NAME)
            with Image.open(path) as picture:
                larger = width >= picture.width
                how = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
                image.paste(picture.convert("RGB").resize((width, height), how), (x, y))
            pen.text((x, y + height + 3), name, GREY, font(13))


def _lines(
    pen: ImageDraw.ImageDraw, lines: Sequence[str], top: int, step: int, ink: str, font: ImageFont.FreeTypeFont
) -> None:
    for number, line in enumerate(lines):
        pen.text((MARGIN, top + number * step), line, ink, font)

"""Contact sheets: rows of pictures with what is said of each row and of each picture; long ones on several sheets."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from pipelines.pictures.text import font, wrap

# All lengths are in pixels. The paper is grey, so that a white picture shows its edge.
PAPER, INK, GREY, RULE = "#f1f1f3", "#1b1b1f", "#6b6b73", "#d9d9de"
MARGIN, GAP = 36, 10
WIDTH = 1800  # of a row's pictures
MOST_COLUMNS = 12  # a row with more pictures takes several lines
CELLS = (112, 384)  # least and greatest long side of a picture that is scaled down
SMALL = 192  # up to which smaller pictures are enlarged, by whole factors, so that single pixels can be seen
NARROWEST = 640  # width of a sheet, so that captions have room
TALLEST = 9000  # height of a sheet; further rows go on the next one
CAPTION_LINES = 3
NAME, LINE, BELOW = 24, 17, 14  # height of a picture's name, of a line of its caption, and of the space below a row
UNREADABLE = "#c8553d"


class Row(NamedTuple):
    caption: str
    pictures: Sequence[Path | bytes]
    names: Sequence[str]  # written below the pictures
    captions: Sequence[str] = ()  # and these below the names, if there are any


class Layout(NamedTuple):
    columns: int
    cell: tuple[int, int]  # width, height
    width: int

    @classmethod
    def of(cls, rows: Sequence[Row], size: tuple[int, int]) -> Layout:
        """For pictures of this height and width."""
        most = max(len(row.pictures) for row in rows)
        columns = _divided(most, _divided(most, MOST_COLUMNS))  # so that a row's lines are equally long
        room = (WIDTH - GAP * (columns - 1)) // columns
        return cls.grid(columns, _cell(size, min(max(room, CELLS[0]), CELLS[1])))

    @classmethod
    def grid(cls, columns: int, cell: tuple[int, int]) -> Layout:
        return cls(columns, cell, max(NARROWEST, columns * (cell[0] + GAP) - GAP) + 2 * MARGIN)


def _divided(number: int, by: int) -> int:
    """Integer division, rounded up."""
    return -(-number // by)


def _cell(size: tuple[int, int], most: int) -> tuple[int, int]:
    """Width and height at which a picture is shown whose long side has room for `most` pixels."""
    height, width = size
    long = max(height, width)
    scale = most / long if long > most else max(1, min(SMALL, most) // long)
    return max(1, round(width * scale)), max(1, round(height * scale))


def sheets(title: str, about: str, rows: Sequence[Row], layout: Layout) -> Iterator[Image.Image]:
    """As many sheets as the rows take. Pictures are read while their sheet is drawn, not before."""
    head = _Head(title, about, layout)
    bands: list[_Band] = []
    for band in (_Band(part, layout) for row in rows for part in _split(row, layout, TALLEST - head.height)):
        if bands and head.height + sum(b.height for b in bands) + band.height > TALLEST:
            yield _sheet(head, bands, layout)
            bands = []
        bands.append(band)
    yield _sheet(head, bands, layout)


def _split(row: Row, layout: Layout, height: int) -> Iterator[Row]:
    """The row, as several with the same caption if it is taller than `height`."""
    band = _Band(row, layout)
    lines = (height - band.caption_height - BELOW) // band.step
    most = max(1, lines) * layout.columns
    for start in range(0, len(row.pictures), most):
        part = slice(start, start + most)
        yield Row(row.caption, row.pictures[part], row.names[part], row.captions[part])


def _sheet(head: _Head, bands: Sequence[_Band], layout: Layout) -> Image.Image:
    image = Image.new("RGB", (layout.width, head.height + sum(band.height for band in bands) + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(image)
    head.draw(pen)
    top = head.height
    for band in bands:
        band.draw(image, pen, top)
        top += band.height
    return image


class _Head:
    """A title, and how the pictures were drawn."""

    def __init__(self, title: str, about: str, layout: Layout) -> None:
        width = layout.width - 2 * MARGIN
        self.title = wrap(title, font(24, bold=True), width, lines=1)
        self.about = wrap(about, font(14), width, lines=CAPTION_LINES) if about else []
        self.height = MARGIN + 34 + 20 * len(self.about) + 14

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        pen.text((MARGIN, MARGIN - 6), self.title[0], INK, font(24, bold=True))
        _lines(pen, self.about, MARGIN + 30, 20, GREY, font(14))


class _Band:
    """One row, in as many lines as its pictures take."""

    def __init__(self, row: Row, layout: Layout) -> None:
        self.row, self.layout = row, layout
        self.caption = wrap(row.caption, font(18), layout.width - 2 * MARGIN, lines=CAPTION_LINES)
        self.caption_height = 14 + 25 * len(self.caption) + 8
        self.step = layout.cell[1] + NAME + (CAPTION_LINES * LINE + GAP if row.captions else 0)
        self.height = self.caption_height + _divided(len(row.pictures), layout.columns) * self.step + BELOW

    def draw(self, image: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        pen.line((MARGIN, top, self.layout.width - MARGIN, top), RULE)
        _lines(pen, self.caption, top + 12, 25, INK, font(18))
        width, height = self.layout.cell
        for number, (source, name) in enumerate(zip(self.row.pictures, self.row.names, strict=True)):
            line, column = divmod(number, self.layout.columns)
            x, y = MARGIN + column * (width + GAP), top + self.caption_height + line * self.step
            picture = fitted(source, self.layout.cell)
            image.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
            pen.text((x, y + height + 3), wrap(name, font(13), width, lines=1)[0], GREY, font(13))
            if self.row.captions:
                caption = wrap(self.row.captions[number], font(13), width, lines=CAPTION_LINES)
                _lines(pen, caption, y + height + NAME, LINE, INK, font(13), left=x)


def fitted(source: Path | bytes, room: tuple[int, int]) -> Image.Image:
    """The picture as large as the room allows, with its shape; a red square if it cannot be read."""
    try:
        file = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(file, formats=("JPEG", "WEBP", "PNG")) as picture:
            scale = min(room[0] / picture.width, room[1] / picture.height)
            return _scaled(picture, (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", room, UNREADABLE)


def _scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarged so that single pixels can be seen, or made smaller smoothly."""
    how = Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, how)


def _lines(
    pen: ImageDraw.ImageDraw,
    lines: Sequence[str],
    top: int,
    step: int,
    ink: str,
    font: ImageFont.FreeTypeFont,
    left: int = MARGIN,
) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * step), line, ink, font)

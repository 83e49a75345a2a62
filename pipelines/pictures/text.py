"""Words on pictures: one font, and lines that fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import ImageFont

from infra.text import printable


def short(text: str, most: int) -> str:
    text = printable(text[: 4 * most])
    return text if len(text) <= most else text[: most - 1] + "…"


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most so many lines; dots stand for what had to go."""

    def fits(line: str) -> bool:
        return font.getlength(line) <= width

    found: list[str] = []
    rest = " ".join(text.split())
    while rest and len(found) < lines:
        line = _longest(rest, fits)
        rest = rest[len(line) :].lstrip()
        found.append(line.rstrip())
    if rest:
        line = found[-1]
        while line and not fits(line + "…"):
            line = line[:-1]
        found[-1] = line.rstrip() + "…"
    return found or [""]


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits, whole words if that is possible; at least one letter."""
    if fits(text):
        return text
    low, high = 1, len(text)  # low fits, or must do; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle)
    space = text.rfind(" ", 0, low + 1)
    return text[: space if space > 0 else low]


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: it has far more scripts than Pillow's own font."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)

"""Text on pictures: one font, and lines that are cut to fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from PIL import ImageFont


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of so many pixels; dots stand for what does not fit."""

    def fits(line: str) -> bool:
        return font.getlength(line) <= width

    wrapped: list[str] = []
    rest = " ".join(text.split())
    while rest and len(wrapped) < lines:
        line = _longest(rest, fits)
        rest = rest[len(line) :].lstrip()
        wrapped.append(line.rstrip())
    if rest:
        line = wrapped[-1]
        while line and not fits(line + "…"):
            line = line[:-1]
        wrapped[-1] = line.rstrip() + "…"
    return wrapped or [""]


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits, whole words if that is possible; at least one letter."""
    if fits(text):
        return text
    low, high = 1, len(text)  # `low` letters fit, or are taken anyway; `high` do not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle)
    space = text.rfind(" ", 0, low + 1)
    return text[: space if space > 0 else low]


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib: it covers far more scripts than Pillow's own font."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)

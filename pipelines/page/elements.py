"""Small elements that several sections use: how a digest, a duration, a table or a picture looks."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from infra.records import EvalReport
from pipelines.page.markup import Child, Html, tag
from pipelines.page.story import Story
from pipelines.page.style import SERIES

QUIET = "var(--quiet)"  # the colour of stages that do not train
THUMBNAIL = 160  # px; larger pictures are scaled down to it


def section(title: str, about: Child, *content: Child) -> Html:
    return tag("section", tag("h2", title), tag("p", about, class_="about") if about else None, content)


def table(head: Sequence[Child], body: Sequence[Sequence[Child]], class_: str) -> Html:
    """Each row begins with its heading."""
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else None
    rows = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in body]
    return tag("div", tag("table", top, tag("tbody", rows), class_=class_), class_="scroll")


def check(holds: bool, text: str) -> Html:
    return tag("p", "✓ " if holds else "✗ ", text, class_="check good" if holds else "check bad")


def short(digest: str) -> Html:
    return tag("code", digest[:8], title=digest)


def words(name: str) -> str:
    """A name as it reads in text: too_small is "too small"."""
    return name.replace("_", " ")


def amount(count: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}\xa0{unit}"
    return str(count)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        text = f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    elif whole < 3600:
        text = f"{whole // 60} min {whole % 60:02d} s"
    else:
        text = f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return text.replace(" ", "\xa0")


def overall(report: EvalReport) -> str | None:
    """The name of the score that stands for the report."""
    name = f"{report.protocol}/overall"
    return name if name in report.scores else next(iter(report.scores), None)


def ink(story: Story, number: int) -> str:
    """The colour of a stage: each training stage has its own on the whole page, and its evaluation has the same."""
    owner = story.checkpoint_number(story.reports[number].checkpoint) if number in story.reports else number
    if owner not in story.checkpoints:
        return QUIET
    return f"var(--series-{list(story.checkpoints).index(owner) % SERIES})"


def swatch(story: Story, number: int, *label: Child) -> Html:
    return tag("span", label, class_="swatch", style=f"--ink:{ink(story, number)}")


def image(data: bytes, tip: str) -> Html:
    """The picture as a data URI; a small one keeps its bytes, a large one becomes a thumbnail."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            kind, small = str(opened.format).lower(), max(opened.size) <= THUMBNAIL
            if not small:
                kind, data = "jpeg", _thumbnail(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow raises SyntaxError for a broken PNG
        return tag("span", "unreadable", class_="none")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=tip, class_="pixels" if small else None)


def _thumbnail(opened: Image.Image) -> bytes:
    buffer = io.BytesIO()
    opened.thumbnail((THUMBNAIL, THUMBNAIL))
    opened.convert("RGB").save(buffer, "JPEG", quality=88)
    return buffer.getvalue()

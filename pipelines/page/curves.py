"""The section on training: every stage's curves over the number of images that its weights have seen."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.page import plots
from pipelines.page.elements import ink, section
from pipelines.page.markup import Html, tag
from pipelines.page.plots import Line
from pipelines.page.story import Story

_EARLIER = {  # what columns were called in curves that are kept
    "perf/images_per_second": "train/images_per_second",
    "perf/data_wait": "data/wait_share",
}
FIRST_HUE, LAST_HUE = 265, 30  # of the loss by time t: violet at t = 0, noise, orange at t = 1, the image


def section_of(story: Story) -> Html | None:
    if not any(story.curves.values()):
        return None
    marks = {float(_offset(story, k)): story.stages[k].stage for k in story.checkpoints}
    cosines = [*_lines(story, "repa/cosine"), *_lines(story, "repa/cosine_shuffled", dashed=True)]
    losses = [*_lines(story, "train/loss"), *_lines(story, "val/loss", dashed=True)]
    speeds = _lines(story, "perf/images_per_second")
    charts = (
        _chart(
            "Velocity loss",
            "The squared error of the velocity; dashed: of held-out samples.",
            losses,
            marks,
            log=True,
        ),
        _chart("Loss by time", "From t = 0, noise, to t = 1, the image.", _by_time(story), marks, log=True),
        _chart("REPA", "Cosine with the image's own features; dashed: with another's.", cosines, marks),
        _chart("Speed", f"Images a second. {_waiting(story)}", speeds, marks, zero=True),
    )
    return section("Training", None, tag("div", charts, class_="charts"))


def _chart(
    title: str, about: str, lines: Sequence[Line], marks: dict[float, str], *, log: bool = False, zero: bool = False
) -> Html | None:
    svg = plots.lines(lines, title, marks=marks if len(marks) > 1 else {}, log=log, zero=zero)
    if svg is None:
        return None
    legend = plots.legend(line for line in lines if not line.dashed)
    return tag("figure", tag("figcaption", tag("b", title), " ", tag("span", about), legend), svg)


def _offset(story: Story, number: int) -> int:
    """The images that the weights which this stage started from had seen before."""
    return sum(story.checkpoints[k].position for k in story.before(number))


def _points(story: Story, number: int, column: str) -> list[plots.Point]:
    offset = _offset(story, number)
    return [(offset + row["images"], _value(row, column)) for row in story.curves.get(number, [])]


def _value(row: dict[str, float], column: str) -> float | None:
    return row.get(column, row.get(_EARLIER.get(column, "")))


def _lines(story: Story, column: str, *, dashed: bool = False) -> list[Line]:
    return [Line(story.stages[k].stage, ink(story, k), _points(story, k, column), dashed) for k in story.checkpoints]


def _by_time(story: Story) -> list[Line]:
    prefix = "train/loss_t"
    columns = sorted(
        {name for rows in story.curves.values() for row in rows for name in row if name.startswith(prefix)}
    )
    lines = []
    for k, column in enumerate(columns):
        points: list[plots.Point] = []
        for number in story.checkpoints:
            points += [*_points(story, number, column), (0.0, None)]  # a gap between stages
        hue = FIRST_HUE + (LAST_HUE - FIRST_HUE) * k / max(len(columns) - 1, 1)
        lines.append(Line(column.removeprefix(prefix), f"hsl({hue:.0f} 62% 54%)", points))
    return lines


def _waiting(story: Story) -> str:
    shares = [_value(row, "perf/data_wait") for rows in story.curves.values() for row in rows]
    known = [share for share in shares if share is not None]
    return f"Waiting for data took {sum(known) / len(known):.1%} of the time." if known else ""

"""Charts as inline SVG: lines over the number of images seen, and scores with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from infra.text import cut
from pipelines.page.markup import Html, tag

Point = tuple[float, float | None]  # None: a gap in the line

WIDTH, HEIGHT = 520.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 18.0, 30.0
MOST_POINTS = 150  # of a line, about; more could not be told apart at this width


@dataclass(frozen=True)
class Line:
    name: str
    ink: str  # a CSS colour
    points: Sequence[Point]
    dashed: bool = False


class Axis:
    """A linear or logarithmic scale from values to pixels, with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        if high - low <= 1e-9 * abs(high):
            low, high = (low / 2, high * 2) if log and low > 0 else (low - 0.5, high + 0.5)
        self.log = log and low > 0
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            if len(ticks) > 2:
                return ticks[:: math.ceil(len(ticks) / 8)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        while (self.high - self.low) / step > 6:
            step *= 2 if f"{step:e}"[0] != "2" else 2.5
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number short enough for a tick: 12.5k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def lines(
    chart: Sequence[Line], label: str, *, marks: Mapping[float, str], log: bool = False, zero: bool = False
) -> Html | None:
    """Lines over the number of images seen; `marks` says where a stage begins. None if there is no point to draw."""
    runs_of = [_runs(line.points) for line in chart]
    points = [point for runs in runs_of for run in runs for point in run]
    if not points:
        return None
    xs, ys = [0.0, *marks, *(x for x, _ in points)], [y for _, y in points]
    low, high = (0.0 if zero else min(ys)), max(ys)
    slack = 0.0 if log or zero else 0.06 * (high - low)
    x_axis = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low - slack, high + slack, HEIGHT - BOTTOM, TOP, log)
    return tag(
        "svg",
        [_tick(x_axis, x, upright=True) for x in x_axis.ticks()],
        [_tick(y_axis, y, upright=False) for y in y_axis.ticks()],
        tag("text", "images seen", x=WIDTH - RIGHT, y=HEIGHT - 2, class_="axis end"),
        [_mark(x_axis(x), name) for x, name in marks.items()],
        [_line(line, runs, x_axis, y_axis) for line, runs in zip(chart, runs_of, strict=True)],
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        class_="chart",
        role="img",
        aria_label=label,
    )


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The line in pieces without gaps, long ones with fewer points; each keeps its last point."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    stride = math.ceil(max(len(points), 1) / MOST_POINTS)
    return [[*run[:-1:stride], run[-1]] for run in runs if run]


def _tick(axis: Axis, value: float, *, upright: bool) -> Html:
    at = axis(value)
    if upright:
        return tag("text", short(value), x=at, y=HEIGHT - BOTTOM + 14, class_="axis middle")
    rule = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="rule")
    return tag("g", rule, tag("text", short(value), x=LEFT - 6, y=at + 3.5, class_="axis end"))


def _mark(x: float, name: str) -> Html:
    rule = tag("line", x1=x, x2=x, y1=TOP - 12, y2=HEIGHT - BOTTOM, class_="mark")
    return tag("g", rule, tag("text", cut(name, 60), x=x + 4, y=TOP - 5, class_="axis"))


def _line(line: Line, runs: Sequence[Sequence[tuple[float, float]]], x_axis: Axis, y_axis: Axis) -> Html:
    shapes = []
    for run in runs:
        at = [(x_axis(x), y_axis(y)) for x, y in run]
        corners = " ".join(f"{x:g},{y:g}" for x, y in at)
        shapes.append(tag("polyline", points=corners, class_="dashed" if line.dashed else None))
        for (images, value), (x, y) in zip(run, at, strict=True):
            tip = tag("title", f"{line.name}: {value:.4g} at {images:,.0f} images")
            shapes.append(tag("circle", tip, cx=x, cy=y, r=3.5, class_="dot" if len(run) > 1 else "point"))
    return tag("g", shapes, class_="line", style=f"--ink:{line.ink}")


def legend(lines: Iterable[Line]) -> Html:
    keys = [
        tag("span", tag("i", class_="dashed" if line.dashed else None), line.name, style=f"--ink:{line.ink}")
        for line in lines
    ]
    return tag("div", keys, class_="legend")


def interval(value: float, low: float, high: float, most: float, ink: str) -> Html:
    """A score on a scale from 0 to `most`: a dot, and a bar from one end of the interval to the other."""
    axis = Axis(0, most, 4, 136)
    return tag(
        "svg",
        tag("line", x1=4, x2=136, y1=7, y2=7, class_="rule"),
        tag("line", x1=axis(low), x2=axis(high), y1=7, y2=7, class_="range"),
        tag("circle", cx=axis(value), cy=7, r=4, class_="value"),
        viewBox="0 0 140 14",
        class_="interval",
        style=f"--ink:{ink}",
        aria_hidden="true",
    )

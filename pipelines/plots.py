"""Charts as inline SVG: lines, intervals, and the graph of stages. Colours are the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.markup import Html, tag

Point = tuple[float, float | None]  # None: a gap in the line

WIDTH, HEIGHT = 520.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 18.0, 30.0
MOST_POINTS = 150  # of a line: more cannot be told apart at this width


@dataclass(frozen=True)
class Line:
    name: str
    ink: str  # a CSS colour
    points: Sequence[Point]
    dashed: bool = False


class Axis:
    """Values -> pixels, with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log and low > 0 else (low - 0.5, high + 0.5)
        self.log = log and low > 0
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            if len(found) > 2:
                return found
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        while (self.high - self.low) / step > 6:
            step *= 2 if f"{step:e}"[0] != "2" else 2.5
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis has room for it."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def lines(
    found: Sequence[Line],
    label: str,
    *,
    log: bool = False,
    zero: bool = False,
    marks: Mapping[float, str] | None = None,
) -> Html:
    """Lines over the number of images seen; `marks` are the places where a stage begins."""
    drawn = [_thin([(x, y) for x, y in line.points if y is None or math.isfinite(y)]) for line in found]
    known = [(x, y) for points in drawn for x, y in points if y is not None]
    if not known:
        return tag("p", "nothing was logged", class_="muted")
    values, marks = [y for _, y in known], marks or {}
    reach = [x for x, _ in known] + list(marks)
    low, high = (0.0 if zero else min(values)), max(values)
    slack = 0.0 if log else 0.06 * (high - low)
    x_axis = Axis(min(reach), max(reach), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low - (0 if zero else slack), high + slack, HEIGHT - BOTTOM, TOP, log)
    return tag(
        "svg",
        [_tick(x_axis, x, upright=True) for x in x_axis.ticks()],
        [_tick(y_axis, y, upright=False) for y in y_axis.ticks()],
        tag("text", "images seen", x=WIDTH - RIGHT, y=HEIGHT - 2, class_="axis end"),
        [_mark(x_axis(x), name) for x, name in marks.items()],
        [_line(line, points, x_axis, y_axis) for line, points in zip(found, drawn, strict=True)],
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        class_="chart",
        role="img",
        aria_label=label,
    )


def _thin(points: Sequence[Point]) -> list[Point]:
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    return [*points[:-1:stride], *points[-1:]]


def _tick(axis: Axis, value: float, *, upright: bool) -> Html:
    at = axis(value)
    if upright:
        return tag("text", short(value), x=at, y=HEIGHT - BOTTOM + 14, class_="axis middle")
    rule = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="rule")
    return tag("g", rule, tag("text", short(value), x=LEFT - 6, y=at + 3.5, class_="axis end"))


def _mark(x: float, name: str) -> Html:
    rule = tag("line", x1=x, x2=x, y1=TOP - 12, y2=HEIGHT - BOTTOM, class_="mark")
    return tag("g", rule, tag("text", _cut(name, 60), x=x + 4, y=TOP - 5, class_="axis"))


def _line(line: Line, points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> Html:
    runs: list[list[str]] = [[]]
    dots = []
    for x, y in points:
        if y is None:
            runs.append([])
            continue
        px, py = x_axis(x), y_axis(y)
        runs[-1].append(f"{px:g},{py:g}")
        said = f"{line.name}: {y:.4g} at {x:,.0f} images"
        dots.append(
            tag("circle", tag("title", said), cx=px, cy=py, r=3.5, class_="dot" if len(points) > 1 else "point")
        )
    paths = [tag("polyline", points=" ".join(run), class_="dashed" if line.dashed else None) for run in runs if run]
    return tag("g", paths, dots, class_="line", style=f"--ink:{line.ink}")


def legend(found: Iterable[Line]) -> Html:
    keys = [
        tag("span", tag("i", class_="dashed" if line.dashed else None), line.name, style=f"--ink:{line.ink}")
        for line in found
    ]
    return tag("div", keys, class_="legend")


def interval(value: float, low: float, high: float, most: float, ink: str) -> Html:
    """A score on a scale from nought to `most`: a dot, and a bar from one end of the interval to the other."""
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


# ------------------------------------------------------------------------------------------------ the graph of stages


@dataclass(frozen=True)
class Box:
    title: str
    facts: str
    small: str  # in the corner
    ink: str
    tip: str
    link: str
    lane: int  # from the top
    parents: tuple[int, ...]  # earlier boxes


BOX_WIDTH, BOX_HEIGHT, STEP_X, STEP_Y = 144, 54, 164, 84
CORNER = 9


def graph(boxes: Sequence[Box]) -> Html:
    """Boxes in lanes, with an edge from each to those that read from it."""
    columns = arrange([box.lane for box in boxes], [box.parents for box in boxes])
    cells = [(column, box.lane) for column, box in zip(columns, boxes, strict=True)]
    taken = frozenset(cells)
    edges = [_edge(cells[parent], cells[k], taken) for k, box in enumerate(boxes) for parent in box.parents]
    arrow = tag(
        "marker",
        tag("path", d="M0 0L7 3.5L0 7z"),
        id="arrow",
        viewBox="0 0 7 7",
        refX=6.5,
        refY=3.5,
        markerWidth=7,
        markerHeight=7,
        orient="auto",
    )
    width = max(columns, default=0) * STEP_X + BOX_WIDTH + 2
    height = max((box.lane for box in boxes), default=0) * STEP_Y + BOX_HEIGHT + 2
    return tag(
        "svg",
        tag("defs", arrow),
        [tag("path", d=edge, class_="edge", marker_end="url(#arrow)") for edge in edges],
        [_box(box, cell) for box, cell in zip(boxes, cells, strict=True)],
        viewBox=f"-1 -1 {width} {height}",
        class_="graph",
        style=f"max-width:{1.25 * width:g}px;min-width:{0.72 * width:g}px",
        role="img",
        aria_label="the stages, and which reads from which",
    )


def arrange(lanes: Sequence[int], parents: Sequence[Sequence[int]]) -> list[int]:
    """A column for each box: right of its parents in its own lane, left of none in others, one box to a cell."""
    columns: list[int] = []
    taken: set[tuple[int, int]] = set()
    for lane, above in zip(lanes, parents, strict=True):
        column = max((columns[p] + (lanes[p] == lane) for p in above), default=0)
        while (column, lane) in taken:
            column += 1
        columns.append(column)
        taken.add((column, lane))
    # Then each goes as far right as its children allow, to stand above the first of them.
    for k in reversed(range(len(lanes))):
        children = [c for c, above in enumerate(parents) if k in above]
        furthest = min((columns[c] - (lanes[c] == lanes[k]) for c in children), default=columns[k])
        free = [column for column in range(columns[k] + 1, furthest + 1) if (column, lanes[k]) not in taken]
        if free:
            taken.remove((columns[k], lanes[k]))
            columns[k] = free[-1]
            taken.add((columns[k], lanes[k]))
    return columns


def _edge(start: tuple[int, int], end: tuple[int, int], taken: frozenset[tuple[int, int]]) -> str:
    """A path with at most two bends that goes through empty cells where there are some."""
    (x, y), (to_x, to_y) = start, end
    middle, top, bottom = BOX_WIDTH / 2, to_y * STEP_Y - 2, y * STEP_Y + BOX_HEIGHT
    cx, to_cx = x * STEP_X + middle, to_x * STEP_X + middle
    right, level = x * STEP_X + BOX_WIDTH, y * STEP_Y + BOX_HEIGHT / 2
    if y == to_y and to_x == x + 1:
        return f"M{right:g} {level:g}H{to_x * STEP_X - 2:g}"
    if to_y > y and x == to_x:
        return f"M{cx:g} {bottom:g}V{top:g}"
    if to_y > y and to_x > x:
        across_first = {(c, y) for c in range(x + 1, to_x + 1)} | {(to_x, r) for r in range(y, to_y)}
        if not across_first & taken:
            bend = to_cx - CORNER
            return f"M{right:g} {level:g}H{bend:g}q{CORNER} 0 {CORNER} {CORNER}V{top:g}"
        down_first = {(x, r) for r in range(y + 1, to_y + 1)} | {(c, to_y) for c in range(x, to_x)}
        if not down_first & taken:
            to_level = to_y * STEP_Y + BOX_HEIGHT / 2
            return f"M{cx:g} {bottom:g}V{to_level - CORNER:g}q0 {CORNER} {CORNER} {CORNER}H{to_x * STEP_X - 2:g}"
    return _through_gutter(cx + 14, bottom, to_cx - 14, top if to_y > y else to_y * STEP_Y + BOX_HEIGHT + 2, to_y > y)


def _through_gutter(x: float, y: float, to_x: float, to_y: float, down: bool) -> str:
    """Along the space between two lanes: above the box that reads, or below it if that stands no lower."""
    turn = CORNER if to_x >= x else -CORNER
    gutter = to_y - 12 if down else max(y, to_y) + 12
    last = CORNER if down else -CORNER
    return (
        f"M{x:g} {y:g}V{gutter - CORNER:g}q0 {CORNER} {turn} {CORNER}H{to_x - turn:g}q{turn} 0 {turn} {last}V{to_y:g}"
    )


def _box(box: Box, cell: tuple[int, int]) -> Html:
    x, y = cell[0] * STEP_X, cell[1] * STEP_Y
    group = tag(
        "g",
        tag("title", box.tip),
        tag("rect", width=BOX_WIDTH, height=BOX_HEIGHT, rx=7, class_="box"),
        tag("rect", x=0, y=9, width=3.5, height=BOX_HEIGHT - 18, rx=1.75, class_="kind"),
        tag("text", _cut(box.title, 14), x=13, y=22, class_="name"),
        tag("text", box.small, x=BOX_WIDTH - 9, y=22, class_="axis end"),
        tag("text", _cut(box.facts, 24), x=13, y=41, class_="axis"),
        transform=f"translate({x} {y})",
        style=f"--ink:{box.ink}",
    )
    return tag("a", group, href=box.link)


def _cut(said: str, most: int) -> str:
    return said if len(said) <= most else said[: most - 1] + "…"

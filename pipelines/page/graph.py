"""The graph of stages as inline SVG. Boxes stand in lanes (rows) and columns; an edge has at most two bends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infra.text import cut
from pipelines.page.markup import Html, tag


@dataclass(frozen=True)
class Box:
    title: str
    fact: str
    corner: str
    ink: str
    tip: str
    link: str
    lane: int  # its row, 0 at the top
    parents: tuple[int, ...]  # numbers of earlier boxes


BOX_WIDTH, BOX_HEIGHT, STEP_X, STEP_Y = 144, 54, 164, 84
CORNER = 9


def graph(boxes: Sequence[Box]) -> Html:
    """The boxes, with an edge from each to those that name it as a parent."""
    used = sorted({box.lane for box in boxes})
    lanes = [used.index(box.lane) for box in boxes]  # empty lanes are left out
    columns = arrange(lanes, [box.parents for box in boxes])
    cells = list(zip(columns, lanes, strict=True))
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
    height = max(lanes, default=0) * STEP_Y + BOX_HEIGHT + 2
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
    """A column for each box: right of parents in its own lane, not left of parents in others, one box to a cell."""
    columns: list[int] = []
    taken: set[tuple[int, int]] = set()
    for lane, above in zip(lanes, parents, strict=True):
        column = max((columns[p] for p in above), default=0)
        while (column, lane) in taken:
            column += 1
        columns.append(column)
        taken.add((column, lane))
    # Then each box moves right as far as its children allow, so that it stands above the first of them.
    for k in reversed(range(len(lanes))):
        children = [c for c, above in enumerate(parents) if k in above]
        furthest = min((columns[c] - (lanes[c] == lanes[k]) for c in children), default=columns[k])
        free = [column for column in range(columns[k] + 1, furthest + 1) if (column, lanes[k]) not in taken]
        if free:
            taken.remove((columns[k], lanes[k]))
            columns[k] = free[-1]
            taken.add((columns[k], lanes[k]))
    return [column - min(columns) for column in columns]


def _edge(start: tuple[int, int], end: tuple[int, int], taken: frozenset[tuple[int, int]]) -> str:
    """An SVG path from cell to cell (column, lane), through empty cells if there is a way with at most two bends."""
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
    """A path along the space between two lanes: above the box that it ends at, or below it if that is not lower."""
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
        tag("text", cut(box.title, 14), x=13, y=22, class_="name"),
        tag("text", box.corner, x=BOX_WIDTH - 9, y=22, class_="axis end"),
        tag("text", cut(box.fact, 24), x=13, y=41, class_="axis"),
        transform=f"translate({x} {y})",
        style=f"--ink:{box.ink}",
    )
    return tag("a", group, href=box.link)

"""The chart of a sweep: overall scores with their intervals over guidance, a line for each other setting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.pictures.statistics import BAD, INK, LINES, PAPER

if TYPE_CHECKING:
    from pipelines.evaluation.sweep import Scored, Sweep


def draw(sweep: Sweep, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), facecolor=PAPER, layout="constrained")
    ax = figure.subplots()
    lines: dict[str, list[Scored]] = {}
    for scored in sweep.points:
        lines.setdefault(named(scored), []).append(scored)
    for number, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda scored: scored.point.guidance)
        xs = [scored.point.guidance for scored in points]
        overall = [scored.scores["geneval/overall"] for scored in points]
        ys = [score.value for score in overall]
        below = [0.0 if score.low is None else score.value - score.low for score in overall]
        above = [0.0 if score.high is None else score.high - score.value for score in overall]
        ink = LINES[number % len(LINES)]
        ax.errorbar(xs, ys, yerr=[below, above], color=ink, marker="o", capsize=3, linewidth=1.4, label=name)
    best = sweep.points[sweep.best]
    ax.scatter([best.point.guidance], [best.scores["geneval/overall"].value], s=160, facecolors="none", edgecolors=BAD)
    ax.set_xlabel("guidance")
    ax.set_ylabel(f"geneval/overall on `{sweep.prompt_set}`")
    ax.set_title(f"the rule `{sweep.rule}` chooses the circled point", fontsize=10, color=INK, loc="left")
    ax.set_facecolor(PAPER)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def named(scored: Scored) -> str:
    """A point without its guidance: `25 steps of adams2, EMA 0.999`."""
    point = scored.point
    decay = "" if point.decay is None else f", EMA {point.decay:g}"
    return f"{point.steps} steps of {point.solver}{decay}"

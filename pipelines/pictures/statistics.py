"""Charts of what prepared shards hold, as one PNG.

Text from the corpus is drawn as plain text: no markup, no control characters; letters that the font lacks are boxes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.upkeep.statistics import Histogram, Summary
from infra.text import cut, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "#fafafa"
INK, MUTED, GOOD, BAD = "#1b1b1f", "#7a7a84", "#3b6fb6", "#c8553d"
LINES = ("#3b6fb6", "#c8553d", "#4f9d69", "#8b5fbf", "#d19a2e", "#5c6470")
MOST_BARS = 10


def draw(summary: Summary, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    panels = _panels(summary)
    rows = -(-len(panels) // 3)
    # `parse_math`: dollars in names begin no formula. A letter that the font lacks needs no warning.
    rc = {"text.parse_math": False, "font.size": 9, "axes.edgecolor": MUTED}
    with matplotlib.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = Figure(figsize=(15, 1.1 + 3.3 * rows), facecolor=PAPER, layout="constrained")
        figure.suptitle(_title(summary), fontsize=13, color=INK, linespacing=1.5)
        axes = list(figure.subplots(rows, 3, squeeze=False).flat)
        for ax, (title, panel) in zip(axes, panels, strict=False):
            ax.set_title(title, fontsize=10, color=INK, loc="left")
            ax.set_facecolor(PAPER)
            ax.spines[["top", "right"]].set_visible(False)
            panel(ax)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        figure.savefig(path, dpi=110, format="png")


def _title(summary: Summary) -> str:
    inputs = summary.inputs - summary.tried_again
    again = f" ({summary.tried_again:,} tried again)" if summary.tried_again else ""
    return (
        f"{summary.accepted:,} of {inputs:,} inputs{again} are samples ({summary.accepted / max(inputs, 1):.1%})\n"
        f"size {printable(summary.size)} · plan {summary.plan} · {summary.shards:,} shards · "
        f"{_bytes(summary.tar_bytes)} of images"
    )


def _bytes(count: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    step = min(int(np.log2(max(count, 1)) / 10), len(units) - 1)
    return f"{count / 1024**step:,.4g} {units[step]}"


def _panels(summary: Summary) -> list[tuple[str, Callable[[Axes], None]]]:
    fates = {name: (s.accepted, sum(s.rejected.values())) for name, s in summary.sources.items()}
    panels: list[tuple[str, Callable[[Axes], None]]] = [
        ("sources: accepted and rejected", partial(_bars, counts=fates, total=summary.inputs)),
        ("why inputs were rejected", partial(_bars, counts=_single(summary.rejected, BAD), total=summary.inputs)),
        ("caption length in words, by kind", partial(_lines, histograms=summary.words)),
        ("shorter side of the originals, pixels", partial(_histogram, histogram=summary.shorter_side, base=2)),
        ("aspect of the originals, width / height", partial(_histogram, histogram=summary.aspect, base=2)),
        ("size of a stored image, KiB", partial(_histogram, histogram=summary.kibibytes, base=2)),
        ("sizes in the shards", partial(_bars, counts=_single(summary.buckets), total=summary.accepted)),
        ("formats", partial(_bars, counts=_single(summary.formats), total=summary.accepted)),
        ("licences", partial(_bars, counts=_single(summary.licences), total=summary.accepted)),
    ]
    panels += [
        (printable(name), partial(_histogram, histogram=histogram)) for name, histogram in summary.values.items()
    ]
    for name, causes in summary.failures.items():
        bars = partial(_bars, counts=_single(causes, BAD), total=summary.accepted)
        panels.append((f"{printable(name)}: why there is no value", bars))
    return panels


def _single(counts: Mapping[str, int], colour: str = GOOD) -> dict[str, tuple[int, int]]:
    """Counts for `_bars` that are all of one colour."""
    return {name: (0, count) if colour == BAD else (count, 0) for name, count in counts.items()}


def _bars(ax: Axes, counts: Mapping[str, tuple[int, int]], total: int) -> None:
    """A bar for each name in the order given, with its good and bad counts; the last bar sums up what has no room."""
    shown = list(counts.items())
    if len(shown) > MOST_BARS:
        rest = [count for _, count in shown[MOST_BARS - 1 :]]
        both = sum(good for good, _ in rest), sum(bad for _, bad in rest)
        shown = [*shown[: MOST_BARS - 1], (f"({len(rest)} others)", both)]
    if not shown:
        _none(ax)
        ax.set_axis_off()
        return
    good, bad = (np.array([count[k] for _, count in shown]) for k in (0, 1))
    places = np.arange(len(shown)) + 0.2
    ax.barh(places, good, color=GOOD, height=0.42)
    ax.barh(places, bad, left=good, color=BAD, height=0.42)
    most = max(int((good + bad).max()), 1)
    for place, (name, (first, second)) in enumerate(shown):
        # Above the bar and not left of the axis, where a long name would make the panel narrower.
        label = cut(name, 40) or "(none)"
        ax.text(0, place - 0.2, label, va="center", color=INK, fontsize=8.5, clip_on=True)
        count = first + second
        share = f"{count:,} ({count / max(total, 1):.1%})"
        ax.text(most, place - 0.2, share, ha="right", va="center", color=MUTED, fontsize=8.5)
    ax.set_ylim(max(len(shown), 4) - 0.4, -0.6)
    ax.set_xlim(0, most)
    ax.set_axis_off()


def _histogram(ax: Axes, histogram: Histogram, base: int | None = None) -> None:
    edges = np.array(histogram.edges)
    ax.stairs(histogram.counts, edges, fill=True, color=GOOD)
    if histogram.mean is None:
        _none(ax)
        return
    if base:
        ax.set_xscale("log", base=base)
    else:
        ax.locator_params(axis="x", nbins=6)
    filled = np.flatnonzero(histogram.counts)
    ax.set_xlim(edges[max(filled[0] - 1, 0)], edges[min(filled[-1] + 2, len(edges) - 1)])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    ax.axvline(histogram.mean, color=INK, linewidth=1, linestyle=":")
    label = f"{histogram.least:.4g} to {histogram.most:.4g}, mean {histogram.mean:.4g}"
    ax.text(0.99, 0.97, label, ha="right", va="top", color=MUTED, fontsize=8, transform=ax.transAxes)
    _plain_counts(ax)


def _lines(ax: Axes, histograms: Mapping[str, Histogram]) -> None:
    """Several histograms with the same bins, all drawn equally wide, though the later bins span more lengths."""
    shown = list(histograms.items())[: len(LINES)]
    if not shown:
        _none(ax)
        return
    edges = shown[0][1].edges
    for colour, (kind, histogram) in zip(LINES, shown, strict=False):
        mean = "" if histogram.mean is None else f", mean {histogram.mean:.1f}"
        label = f"{cut(kind, 24)}: {sum(histogram.counts):,}{mean}"
        ax.stairs(histogram.counts, np.arange(len(edges)), color=colour, linewidth=1.8, label=label)
    last = max(np.flatnonzero(histogram.counts)[-1] for _, histogram in shown if any(histogram.counts))
    ticks = np.arange(0, len(edges), 2)
    ax.set_xticks(ticks, [f"{edges[k]:g}" for k in ticks])
    ax.set_xlim(0, min(last + 3, len(edges) - 1))
    ax.legend(frameon=False, fontsize=8)
    _plain_counts(ax)


def _none(ax: Axes) -> None:
    ax.text(0.5, 0.5, "none", ha="center", va="center", color=MUTED, transform=ax.transAxes)


def _plain_counts(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_ylim(0, 1.15 * max(ax.get_ylim()[1], 1) / 1.05)

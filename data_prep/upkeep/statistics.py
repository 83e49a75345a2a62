"""What prepared shards hold: counts and histograms out of their indexes, a picture of those, and a sheet of samples.

    summarise  ->  Summary: plain data      ->  draw: one PNG
    contact_sheet: some samples, the same ones for the same seed, each with a caption, its source and its size

Indexes are read once, a few at a time. Whatever the corpus says is drawn as plain text: no markup, no control
characters; letters that the font lacks are boxes.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from data_prep.prepare.plan import all_shards, read_plan
from data_prep.scores.job import SideTables
from data_prep.snapshots.build import index_schema
from data_prep.snapshots.captions import appended, word_counts
from data_prep.sources.reading import READERS, in_order
from infra.errors import SettingsError
from infra.records import ShardRecord
from infra.shards import read_index
from infra.store import Store
from infra.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image, ImageFont

Values = npt.NDArray[Any]

MOST_NAMES = 1000  # of one kind that are counted by name: a corpus may have a licence or a kind for every sample
OTHERS = "(others)"

COLUMNS = (
    *("source", "accepted", "cause", "format", "licence", "original_width", "original_height", "width", "height"),
    *("length", "captions"),
)
SIDES = np.geomspace(16, 16384, 41)  # four steps to every doubling
ASPECTS = 2 ** np.linspace(-2, 2, 33)
LENGTHS = np.geomspace(1, 65536, 33)  # KiB
WORDS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024])
SCORE_BINS = 40
LARGEST = 1e300  # that an edge can be: larger numbers cannot be drawn
FAILURE = "_failure"  # what a scorer's column of causes ends in


# ------------------------------------------------------------------------------------------------ counting


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Histogram(_Plain):
    """counts[k] values lie in [edges[k], edges[k + 1]); the first and the last hold what lies beyond them too."""

    edges: list[float]
    counts: list[int]
    least: float | None
    mean: float | None
    most: float | None


class SourceSummary(_Plain):
    accepted: int
    rejected: dict[str, int]  # cause -> count
    bytes: int  # of the accepted images


class Summary(_Plain):
    plan: str
    size: str
    edition: str
    shards: int
    inputs: int  # those that were tried again count twice
    tried_again: int
    accepted: int
    rejected: dict[str, int]
    tar_bytes: int
    index_bytes: int
    sources: dict[str, SourceSummary]  # the one with the most samples first, and so on for all names below
    licences: dict[str, int]  # of accepted samples, as are all that follow
    formats: dict[str, int]
    buckets: dict[str, int]  # "WIDTHxHEIGHT"
    shorter_side: Histogram  # of the originals, in pixels
    aspect: Histogram  # of the originals, width / height
    kibibytes: Histogram  # of an image as it is stored
    words: dict[str, Histogram]  # kind of caption -> its words
    captions: dict[str, int]  # kind -> how many there are
    values: dict[str, Histogram]  # column that was asked for, or a score's
    failures: dict[str, dict[str, int]]  # a score's column of causes -> cause -> samples without a value


def summarise(
    store: Store,
    plan: str,
    edition: str,
    size: str,
    *,
    columns: Sequence[str] = (),
    scores: Sequence[str] = (),
    readers: int = READERS,
) -> Summary:
    """Count what the shards of a plan hold at one size.

    Histograms of the index's `columns` are added, and what is in the side tables called `scores`: histograms, failures
    by cause, and captions among the others. A column that several of them have is called `NAME (SCORE)`.
    """
    planned = read_plan(store, plan, edition)
    shards = all_shards(store, planned, size)
    side_tables = SideTables(store, plan, size, shards, list(dict.fromkeys(scores)))
    counted = _Counted()
    for found in in_order(partial(_read, store, columns, side_tables), shards, readers):
        counted.add(found)
    counted.check(columns)
    return Summary(
        plan=plan,
        size=size,
        edition=edition,
        shards=len(shards),
        inputs=sum(shard.inputs for shard in shards),
        tried_again=sum(shard.expected for shard in planned.shards if shard.generation),
        accepted=sum(shard.accepted for shard in shards),
        rejected=_ranked(sum((Counter(shard.rejected) for shard in shards), Counter())),
        tar_bytes=sum(shard.tar.size for shard in shards if shard.tar is not None),
        index_bytes=sum(shard.index.size for shard in shards),
        **counted.results(),
    )


class _Read(NamedTuple):
    """A shard's index, and of its accepted rows the captions and what was asked for."""

    index: pa.Table
    captions: pa.ListArray
    values: dict[str, Values]
    failures: dict[str, pa.ChunkedArray]


def _read(store: Store, columns: Sequence[str], side_tables: SideTables, shard: ShardRecord) -> _Read:
    there = index_schema(store, shard).names if columns else []
    wanted = [*COLUMNS, *(["key"] if side_tables.scorers else []), *(name for name in columns if name in there)]
    index = read_index(store, shard, list(dict.fromkeys(wanted)))
    accepted = index.filter(index["accepted"])
    captions = accepted["captions"].combine_chunks()
    values = {name: _numbers(name, accepted[name]) for name in columns if name in there}
    failures = {}
    tables = side_tables.read(shard.number, accepted["key"]) if side_tables.scorers and shard.tar is not None else []
    for labels, table in zip(_labels(columns, side_tables), tables, strict=False):
        for field in table.schema:
            column, label = table[field.name], labels[field.name]
            if field.name == "captions":
                captions = appended(captions, column.combine_chunks())
            elif _is_number(field.type):
                values[label] = _numbers(label, column)
            elif field.name.endswith(FAILURE):
                failures[label] = column.drop_null()
    return _Read(index, captions, values, failures)


def _labels(columns: Sequence[str], side_tables: SideTables) -> list[dict[str, str]]:
    """What each side table's columns are called here."""
    count = Counter([*columns, *(field.name for field in side_tables.fields)])
    return [
        {name: name if count[name] < 2 else f"{name} ({scorer})" for name in schema.names}
        for scorer, schema in side_tables.schemas.items()
    ]


def _is_number(of: pa.DataType) -> bool:
    is_one = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal)
    return any(check(of) for check in is_one)


def _numbers(name: str, column: pa.ChunkedArray) -> Values:
    """Half as wide where that loses nothing: they are kept until the end."""
    if not _is_number(column.type) and not pa.types.is_null(column.type):
        raise SettingsError(f"`{name}` is no column of numbers", remedy="ask for a column that a filter can compare")
    values: Values = column.cast(pa.float64(), safe=False).drop_null().to_numpy()
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values) else values


class _Bins:
    """A histogram that grows."""

    def __init__(self, edges: Values) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, np.int64)
        self.total, self.least, self.most = np.longdouble(0), np.inf, -np.inf

    def add(self, values: Values) -> None:
        if len(values):
            self.counts += np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges)[0]
            self.total += values.sum(dtype=np.longdouble)  # a column may hold the largest numbers there are
            self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))

    def result(self) -> Histogram:
        count = int(self.counts.sum())
        return Histogram(
            edges=self.edges.tolist(),
            counts=self.counts.tolist(),
            least=self.least if count else None,
            mean=float(self.total / count) if count else None,
            most=self.most if count else None,
        )


class _Counted:
    """What the rows add up to."""

    def __init__(self) -> None:
        self.fates: dict[str, Counter[str | None]] = {}  # source -> cause, None where accepted
        self.bytes: Counter[str] = Counter()
        self.names: dict[str, Counter[str]] = {name: Counter() for name in ("licence", "format", "bucket", "kind")}
        self.side, self.aspect, self.length = _Bins(SIDES), _Bins(ASPECTS), _Bins(LENGTHS)
        self.words: dict[str, _Bins] = {}
        self.values: dict[str, list[Values]] = {}  # kept: how far they reach is known at the end
        self.failures: dict[str, Counter[str]] = {}

    def add(self, read: _Read) -> None:
        index = read.index
        for row in index.group_by(["source", "cause"]).aggregate([([], "count_all"), ("length", "sum")]).to_pylist():
            self.fates.setdefault(row["source"], Counter())[row["cause"]] += row["count_all"]
            self.bytes[row["source"]] += row["length_sum"] or 0
        accepted = index.filter(index["accepted"])
        self._count(self.names["licence"], accepted["licence"])
        self._count(self.names["format"], accepted["format"])
        across = [accepted[side].cast(pa.string()) for side in ("width", "height")]
        self._count(self.names["bucket"], pc.binary_join_element_wise(*across, "x"))
        width, height = (accepted[f"original_{side}"].to_numpy().astype(np.float64) for side in ("width", "height"))
        self.side.add(np.minimum(width, height))
        self.aspect.add(width / height)
        self.length.add(accepted["length"].to_numpy() / 1024)
        self._captions(read.captions)
        for name, numbers in read.values.items():
            self.values.setdefault(name, []).append(numbers)
        for name, causes in read.failures.items():
            self._count(self.failures.setdefault(name, Counter()), causes)

    def _captions(self, captions: pa.ListArray) -> None:
        flat = captions.flatten()
        kinds = flat.field("kind").dictionary_encode()
        code, words = kinds.indices.to_numpy(), word_counts(flat.field("text"))
        for number, kind in enumerate(kinds.dictionary.to_pylist()):
            kind = kind if kind in self.words or len(self.words) < MOST_NAMES else OTHERS
            here = words[code == number]
            self.names["kind"][kind] += len(here)
            self.words.setdefault(kind, _Bins(WORDS)).add(here)

    def _count(self, counts: Counter[str], column: pa.ChunkedArray) -> None:
        for pair in pc.value_counts(column.combine_chunks()).to_pylist():
            name = pair["values"] or ""
            counts[name if name in counts or len(counts) < MOST_NAMES else OTHERS] += pair["counts"]

    def check(self, columns: Sequence[str]) -> None:
        for name in columns:
            if name not in self.values:
                raise SettingsError(f"no shard has a column `{name}`", remedy="ask for one that its source keeps")

    def results(self) -> dict[str, Any]:
        accepted = _ranked({name: fates[None] for name, fates in self.fates.items()})
        rejected = {name: {cause: n for cause, n in fates.items() if cause} for name, fates in self.fates.items()}
        values = {name: np.concatenate(parts) for name, parts in self.values.items()}
        return {
            "sources": {
                name: SourceSummary(accepted=count, rejected=_ranked(rejected[name]), bytes=self.bytes[name])
                for name, count in accepted.items()
            },
            "licences": _ranked(self.names["licence"]),
            "formats": _ranked(self.names["format"]),
            "buckets": _ranked(self.names["bucket"]),
            "shorter_side": self.side.result(),
            "aspect": self.aspect.result(),
            "kibibytes": self.length.result(),
            "words": {kind: self.words[kind].result() for kind in _ranked(self.names["kind"])},
            "captions": _ranked(self.names["kind"]),
            "values": {name: _evenly(values[name]) for name in sorted(values)},
            "failures": {name: _ranked(self.failures[name]) for name in sorted(self.failures)},
        }


def _evenly(values: Values) -> Histogram:
    """In steps of one length, as far as the values reach."""
    bins = _Bins(_edges(float(values.min()), float(values.max())) if len(values) else np.linspace(0, 1, SCORE_BINS + 1))
    bins.add(values)
    return bins.result()


def _edges(low: float, high: float) -> Values:
    low, high = (min(max(end, -LARGEST), LARGEST) for end in (low, high))
    least = SCORE_BINS * float(np.spacing(max(abs(low), abs(high))))  # shorter bins would have no numbers in them
    if high - low < least:
        low, high = low - max(0.5, least), high + max(0.5, least)
    return np.linspace(low, high, SCORE_BINS + 1)


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# ------------------------------------------------------------------------------------------------ drawing

PAPER, TABLE = "#fafafa", "#ececf0"  # on which a white picture shows its edge
INK, MUTED, GOOD, BAD = "#1b1b1f", "#7a7a84", "#3b6fb6", "#c8553d"
LINES = ("#3b6fb6", "#c8553d", "#4f9d69", "#8b5fbf", "#d19a2e", "#5c6470")
MOST_BARS = 10
CELL, GAP, MARGIN, FONT = 192, 14, 28, 13
TEXT_LINES = 3  # of a caption on the sheet


def draw(summary: Summary, path: Path) -> None:
    """The summary as one picture."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = _panels(summary)
    rows = -(-len(panels) // 3)
    # Dollars in names are no formulas, and a letter that the font lacks is no reason to speak up.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "axes.edgecolor": MUTED}), _silence():
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


@contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


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
    values = [(printable(name), partial(_histogram, histogram=found)) for name, found in summary.values.items()]
    whys = [
        (
            f"{printable(name)}: why there is no value",
            partial(_bars, counts=_single(causes, BAD), total=summary.accepted),
        )
        for name, causes in summary.failures.items()
    ]
    return [*panels, *values, *whys]


def _single(counts: Mapping[str, int], colour: str = GOOD) -> dict[str, tuple[int, int]]:
    return {name: (0, count) if colour == BAD else (count, 0) for name, count in counts.items()}


def _bars(ax: Axes, counts: Mapping[str, tuple[int, int]], total: int) -> None:
    """A line for each name, the largest on top; those beyond the last line together."""
    shown = list(counts.items())
    if len(shown) > MOST_BARS:
        rest = [count for _, count in shown[MOST_BARS - 1 :]]
        both = sum(good for good, _ in rest), sum(bad for _, bad in rest)
        shown = [*shown[: MOST_BARS - 1], (f"({len(rest)} others)", both)]
    if not shown:
        ax.text(0.5, 0.5, "none", ha="center", va="center", color=MUTED, transform=ax.transAxes)
        ax.set_axis_off()
        return
    good, bad = (np.array([count[k] for _, count in shown]) for k in (0, 1))
    places = np.arange(len(shown)) + 0.2
    ax.barh(places, good, color=GOOD, height=0.42)
    ax.barh(places, bad, left=good, color=BAD, height=0.42)
    most = max(int((good + bad).max()), 1)
    for place, (name, (first, second)) in enumerate(shown):
        # Inside of the panel, so that no name, however long, takes room from it.
        label = _short(name, 40) or "(none)"
        ax.text(0, place - 0.2, label, va="center", color=INK, fontsize=8.5, clip_on=True)
        count = first + second
        said = f"{count:,} ({count / max(total, 1):.1%})"
        ax.text(most, place - 0.2, said, ha="right", va="center", color=MUTED, fontsize=8.5)
    ax.set_ylim(max(len(shown), 4) - 0.4, -0.6)
    ax.set_xlim(0, most)
    ax.set_axis_off()


def _histogram(ax: Axes, histogram: Histogram, base: int | None = None) -> None:
    edges = np.array(histogram.edges)
    ax.stairs(histogram.counts, edges, fill=True, color=GOOD)
    if histogram.mean is None:
        ax.text(0.5, 0.5, "none", ha="center", va="center", color=MUTED, transform=ax.transAxes)
        return
    if base:
        ax.set_xscale("log", base=base)
    else:
        ax.locator_params(axis="x", nbins=6)
    there = np.flatnonzero(histogram.counts)
    ax.set_xlim(edges[max(there[0] - 1, 0)], edges[min(there[-1] + 2, len(edges) - 1)])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    ax.axvline(histogram.mean, color=INK, linewidth=1, linestyle=":")
    said = f"{histogram.least:.4g} to {histogram.most:.4g}, mean {histogram.mean:.4g}"
    ax.text(0.99, 0.97, said, ha="right", va="top", color=MUTED, fontsize=8, transform=ax.transAxes)
    _plain_counts(ax)


def _lines(ax: Axes, histograms: Mapping[str, Histogram]) -> None:
    """Several histograms in one panel, over their bins, which grow with the lengths."""
    shown = list(histograms.items())[: len(LINES)]
    if not shown:
        ax.text(0.5, 0.5, "none", ha="center", va="center", color=MUTED, transform=ax.transAxes)
        return
    edges = shown[0][1].edges
    for colour, (kind, histogram) in zip(LINES, shown, strict=False):
        mean = "" if histogram.mean is None else f", mean {histogram.mean:.1f}"
        label = f"{_short(kind, 24)}: {sum(histogram.counts):,}{mean}"
        ax.stairs(histogram.counts, np.arange(len(edges)), color=colour, linewidth=1.8, label=label)
    last = max(np.flatnonzero(histogram.counts)[-1] for _, histogram in shown if any(histogram.counts))
    ax.set_xlim(0, min(last + 3, len(edges) - 1))
    ticks = np.arange(0, len(edges), 2)
    ax.set_xticks(ticks, [f"{edges[k]:g}" for k in ticks])
    ax.set_xlim(0, min(last + 3, len(edges) - 1))
    ax.legend(frameon=False, fontsize=8)
    _plain_counts(ax)


def _plain_counts(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_ylim(0, 1.15 * max(ax.get_ylim()[1], 1) / 1.05)


def _short(text: str, most: int) -> str:
    text = printable(text[: 4 * most])
    return text if len(text) <= most else text[: most - 1] + "…"


# ------------------------------------------------------------------------------------------------ the sheet


class _Cell(NamedTuple):
    image: bytes
    caption: str
    about: str


def contact_sheet(
    store: Store, plan: str, edition: str, size: str, path: Path, *, count: int = 40, seed: int = 0, columns: int = 8
) -> int:
    """A sheet of samples drawn at random, the same ones for the same seed; the number of samples on it."""
    shards = [shard for shard in all_shards(store, read_plan(store, plan, edition), size) if shard.accepted]
    ends = np.cumsum([shard.accepted for shard in shards])
    total = int(ends[-1]) if shards else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    shard_of = np.searchsorted(ends, chosen, side="right")
    work = [(shards[k], (chosen[shard_of == k] - ends[k]).tolist()) for k in np.unique(shard_of)]  # from the end
    cells = [cell for found in in_order(lambda one: _cells(store, *one), work) for cell in found]
    _sheet(cells, columns, f"{len(cells)} of {total:,} samples · size {printable(size)} · plan {plan}").save(
        path, "PNG"
    )
    return len(cells)


def _cells(store: Store, shard: ShardRecord, places: Sequence[int]) -> list[_Cell]:
    assert shard.tar is not None
    names = [
        "accepted",
        "source",
        "original_width",
        "original_height",
        "width",
        "height",
        "offset",
        "length",
        "captions",
    ]
    table = read_index(store, shard, names)
    table = table.filter(table["accepted"])
    cells = []
    for row in table.take([table.num_rows + place for place in places]).to_pylist():
        image = store.get(shard.tar.key, row["offset"], row["offset"] + row["length"])
        sides = f"{row['width']}x{row['height']} of {row['original_width']}x{row['original_height']}"
        text = row["captions"][0]["text"] if row["captions"] else ""
        cells.append(_Cell(image, _short(text or "", 400), f"{_short(row['source'], 14)} · {sides}"))
    return cells


def _sheet(cells: Sequence[_Cell], columns: int, title: str) -> Image.Image:
    from PIL import Image, ImageDraw

    rows = max(1, -(-len(cells) // columns))
    step = CELL + 8 + (TEXT_LINES + 1) * (FONT + 4) + GAP
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + 34 + rows * step - GAP), TABLE)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, _font(18))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (CELL + GAP), MARGIN + 34 + row * step
        picture = _picture(cell.image)
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        y += CELL + 8
        pen.text((x, y), _fitting(cell.about, 1)[0], MUTED, _font(FONT - 2))
        for line, text in enumerate(_fitting(cell.caption, TEXT_LINES), start=1):
            pen.text((x, y + line * (FONT + 4)), text, INK, _font(FONT))
    return sheet


def _picture(data: bytes) -> Image.Image:
    """As large as its cell; a red one where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "WEBP", "PNG")) as found:
            scale = CELL / max(found.size)
            size = max(1, round(found.width * scale)), max(1, round(found.height * scale))
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            return found.convert("RGB").resize(size, how)
    except (OSError, SyntaxError, ValueError):
        return Image.new("RGB", (CELL, CELL), BAD)


def _fitting(text: str, lines: int) -> list[str]:
    """The text in lines that are no wider than a cell; dots stand for what had to go."""
    found: list[str] = []
    rest, font = text, _font(FONT)
    while rest and len(found) < lines:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > CELL:
            end = max(1, min(end - 1, int(end * CELL / font.getlength(rest[:end])) + 1))
        space = rest.rfind(" ", 0, end + 1)
        end = space if end < len(rest) and space > 0 else end
        found.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        found[-1] = found[-1][:-1].rstrip() + "…"
    return found or [""]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings: it has far more scripts than Pillow's own font."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)

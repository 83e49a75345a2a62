"""What prepared shards hold: counts and histograms from their indexes, each read once, a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.prepare.plan import all_shards, read_plan
from data_prep.scores.job import SideTables
from data_prep.snapshots.captions import appended, word_counts
from data_prep.snapshots.columns import index_schema
from data_prep.sources.reading import READERS, in_order
from infra.errors import SettingsError
from infra.records import Plain, ShardRecord
from infra.shards import read_index
from infra.store import Store

Values = npt.NDArray[Any]

MOST_NAMES = 1000  # licences, or kinds of captions, that are counted by name: every sample may have one of its own
OTHERS = "(others)"

COLUMNS = (
    *("source", "accepted", "cause", "format", "licence", "original_width", "original_height", "width", "height"),
    *("length", "captions"),
)
SIDES = np.geomspace(16, 16384, 41)  # pixels, with four bins for every doubling
ASPECTS = 2 ** np.linspace(-2, 2, 33)
LENGTHS = np.geomspace(1, 65536, 33)  # KiB
WORDS = np.array([0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024])
SCORE_BINS = 40
LARGEST = 1e300  # for the edges of a histogram: larger numbers cannot be drawn
FAILURE = "_failure"  # the ending of the name of a scorer's column of causes


class Histogram(Plain):
    """counts[k] values lie in [edges[k], edges[k + 1]); values beyond the edges are in the first and the last bin."""

    edges: list[float]
    counts: list[int]
    least: float | None
    mean: float | None
    most: float | None


class SourceSummary(Plain):
    accepted: int
    rejected: dict[str, int]  # cause -> count
    bytes: int  # of the accepted images


class Summary(Plain):
    plan: str
    size: str
    edition: str
    shards: int
    inputs: int  # those whose download was tried again count twice
    tried_again: int
    accepted: int
    rejected: dict[str, int]
    tar_bytes: int
    index_bytes: int
    sources: dict[str, SourceSummary]  # those with the most samples first, as in all dictionaries below
    licences: dict[str, int]  # of accepted samples, as is all that follows
    formats: dict[str, int]
    buckets: dict[str, int]  # "WIDTHxHEIGHT"
    shorter_side: Histogram  # of the originals, in pixels
    aspect: Histogram  # of the originals, width / height
    kibibytes: Histogram  # of an image as it is stored
    words: dict[str, Histogram]  # kind of caption -> words in a caption
    captions: dict[str, int]  # kind -> count
    values: dict[str, Histogram]  # one of the columns that were asked for, or of a score's -> its values
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

    `columns` of the index get histograms too, and so do those of the side tables with the digests `scores`, whose
    failures are counted by cause and whose captions count like others. A column that occurs in several of these tables
    is called `NAME (SCORE)`.
    """
    planned = read_plan(store, plan, edition)
    shards = all_shards(store, planned, size)
    side_tables = SideTables(store, planned, size, shards, list(dict.fromkeys(scores)))
    totals = _Totals()
    for content in in_order(partial(_read, store, columns, side_tables), shards, readers):
        totals.add(content)
    totals.check(columns)
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
        **totals.results(),
    )


class _Content(NamedTuple):
    """What is counted of a shard."""

    index: pa.Table
    captions: pa.ListArray  # of the accepted rows, as is all that follows
    values: dict[str, Values]
    failures: dict[str, pa.ChunkedArray]


def _read(store: Store, columns: Sequence[str], side_tables: SideTables, shard: ShardRecord) -> _Content:
    names = index_schema(store, shard).names if columns else []
    columns_of_index = [name for name in columns if name in names]
    wanted = [*COLUMNS, *(["key"] if side_tables.scorers else []), *columns_of_index]
    index = read_index(store, shard, list(dict.fromkeys(wanted)))
    accepted = index.filter(index["accepted"])
    captions = accepted["captions"].combine_chunks()
    values = {name: _numbers(name, accepted[name]) for name in columns_of_index}
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
    return _Content(index, captions, values, failures)


def _labels(columns: Sequence[str], side_tables: SideTables) -> list[dict[str, str]]:
    """What the columns of each side table are called in the summary."""
    count = Counter([*columns, *(field.name for field in side_tables.fields)])
    return [
        {name: name if count[name] < 2 else f"{name} ({scorer})" for name in schema.names}
        for scorer, schema in side_tables.schemas.items()
    ]


def _is_number(of: pa.DataType) -> bool:
    types = pa.types
    return any(check(of) for check in (types.is_floating, types.is_integer, types.is_boolean, types.is_decimal))


def _numbers(name: str, column: pa.ChunkedArray) -> Values:
    """The finite values of a column, as float32 where that loses nothing, since all are kept until the end."""
    if not _is_number(column.type) and not pa.types.is_null(column.type):
        raise SettingsError(f"`{name}` is no column of numbers", remedy="ask for a column that a filter can compare")
    values: Values = column.cast(pa.float64(), safe=False).drop_null().to_numpy()
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values) else values


class _Bins:
    """A histogram to which values can be added."""

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


class _Totals:
    """The counts of all shards."""

    def __init__(self) -> None:
        self.fates: dict[str, Counter[str | None]] = {}  # source -> cause, None where accepted
        self.bytes: Counter[str] = Counter()
        self.names: dict[str, Counter[str]] = {name: Counter() for name in ("licence", "format", "bucket", "kind")}
        self.side, self.aspect, self.length = _Bins(SIDES), _Bins(ASPECTS), _Bins(LENGTHS)
        self.words: dict[str, _Bins] = {}
        self.values: dict[str, list[Values]] = {}  # kept, as their range, and so their bins, are known only at the end
        self.failures: dict[str, Counter[str]] = {}

    def add(self, content: _Content) -> None:
        index = content.index
        for row in index.group_by(["source", "cause"]).aggregate([([], "count_all"), ("length", "sum")]).to_pylist():
            self.fates.setdefault(row["source"], Counter())[row["cause"]] += row["count_all"]
            self.bytes[row["source"]] += row["length_sum"] or 0
        accepted = index.filter(index["accepted"])
        self._count(self.names["licence"], accepted["licence"])
        self._count(self.names["format"], accepted["format"])
        sides = [accepted[side].cast(pa.string()) for side in ("width", "height")]
        self._count(self.names["bucket"], pc.binary_join_element_wise(*sides, "x"))
        width, height = (accepted[f"original_{side}"].to_numpy().astype(np.float64) for side in ("width", "height"))
        self.side.add(np.minimum(width, height))
        self.aspect.add(width / height)
        self.length.add(accepted["length"].to_numpy() / 1024)
        self._captions(content.captions)
        for name, numbers in content.values.items():
            self.values.setdefault(name, []).append(numbers)
        for name, causes in content.failures.items():
            self._count(self.failures.setdefault(name, Counter()), causes)

    def _captions(self, captions: pa.ListArray) -> None:
        flat = captions.flatten()
        kinds = flat.field("kind").dictionary_encode()
        code, words = kinds.indices.to_numpy(), word_counts(flat.field("text"))
        for number, kind in enumerate(kinds.dictionary.to_pylist()):
            kind = kind if kind in self.words or len(self.words) < MOST_NAMES else OTHERS
            of_kind = words[code == number]
            self.names["kind"][kind] += len(of_kind)
            self.words.setdefault(kind, _Bins(WORDS)).add(of_kind)

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
        values = {name: np.concatenate(arrays) for name, arrays in self.values.items()}
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
    """A histogram with bins of equal width between the least and the largest value."""
    bins = _Bins(_edges(float(values.min()), float(values.max())) if len(values) else np.linspace(0, 1, SCORE_BINS + 1))
    bins.add(values)
    return bins.result()


def _edges(low: float, high: float) -> Values:
    low, high = (min(max(end, -LARGEST), LARGEST) for end in (low, high))
    least = SCORE_BINS * float(np.spacing(max(abs(low), abs(high))))  # narrower bins would hold no number at all
    if high - low < least:
        low, high = low - max(0.5, least), high + max(0.5, least)
    return np.linspace(low, high, SCORE_BINS + 1)


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

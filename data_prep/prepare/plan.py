"""The plan: which shard is made of which rows, decided before any work, extended by new inputs and never changed.

    plans/<digest>/00000.parquet     the planned shards of the inputs that the first run found
    plans/<digest>/00001.parquet     those of inputs that were added later, and so on
    plans/<digest>/<edition>.json    the inputs that one run found: it makes the shards of these

The digest is that of the settings that change results, so other settings have a plan of their own. A planned shard is a
range of rows of one input. An input is identified by its content: one that changed is a new input, and the shards of
the old one stay in the plan but are in no later edition.

A planned shard becomes one tar at the smallest size, aimed at 256 MiB, and several tars at larger sizes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from data_prep.images.sizes import Buckets, Format, Resize, Size, Subsampling, size_name
from data_prep.prepare import links
from data_prep.prepare.links import At
from data_prep.prepare.retries import RetryRecord, retries, rows_again
from data_prep.sources import AnySource, Bytes, Input, Range, Rows, Source, UrlSource
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.config import Settings, digest, operational
from infra.errors import DataError, SettingsError
from infra.records import Record, ShardRecord, read_record, write_record
from infra.shards import list_shards, parquet_bytes, shard_prefix
from infra.store import Store

_log = logging.getLogger(__name__)

FORMAT = 4  # of the shards; raised when the same input and settings would give other bytes

# Encoded bytes per pixel of photographs, at the default quality: measured, and exact enough to aim at a size.
BYTES_PER_PIXEL = {"jpeg": 0.75, "webp": 0.45, "png": 2.0}

PLAN_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the input
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("expected", pa.int64(), nullable=False),
        pa.field("counted", pa.bool_(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("in_store", pa.bool_(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
    ]
)
RANGE = ("input", "table", "in_store", "first", "rows")  # the fields of a `Range`; for a range of a tar in bytes

Level = Annotated[int, Field(ge=0, le=255)]


class PrepareSettings(Settings):
    sources: list[AnySource] = Field(min_length=1)
    sizes: list[Size] = Field([256], min_length=1, description="square sides and bucket sets, all from one decode")
    resize: Resize = Field(
        "lanczos",
        description="adm: to squares as ADM makes them of ImageNet (halve, then bicubic), small images enlarged",
    )
    format: Format = "jpeg"
    quality: int = Field(95, ge=1, le=100, description="of JPEG and WebP")
    subsampling: Subsampling = Field("444", description="of JPEG's colours")
    text: bool = Field(
        True,
        description="a .txt of the first caption beside each image, as open_clip, diffusers and webdataset read it",
    )
    matte: tuple[Level, Level, Level] = Field((255, 255, 255), description="the colour under transparency")
    max_pixels: int = Field(80_000_000, ge=1, description="larger pictures are refused before they are decoded")
    shard_mib: int = Field(
        256, ge=1, le=1 << 20, description="the size that shards are planned for, by the pixels of their images"
    )
    rows_per_shard: int | None = Field(
        None, ge=1, le=1_000_000, description="images of a shard of the smallest size, in place of `shard_mib`"
    )
    fetch: FetchSettings = FetchSettings()
    keep_originals: bool = operational(True, description="keep downloads, so that another size needs no second one")
    in_flight: int | None = operational(
        None,
        ge=1,
        description="shards that are made, and batches that are downloaded, at once; none: twice the cluster's CPUs",
    )

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, sources: list[AnySource]) -> list[AnySource]:
        twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
        if twice:
            raise ValueError(f"two sources are called `{twice[0]}`: keys are made from the name")
        return sources

    @field_validator("sizes")
    @classmethod
    def _distinct_sizes(cls, sizes: list[Size]) -> list[Size]:
        if len(set(map(size_name, sizes))) < len(sizes):
            raise ValueError("two sizes have the same name")
        return sizes

    @model_validator(mode="after")
    def _adm_makes_squares(self) -> PrepareSettings:
        if self.resize == "adm" and (buckets := [s.name for s in self.sizes if isinstance(s, Buckets)]):
            raise ValueError(f"resize: adm makes squares, and `{buckets[0]}` in `sizes` is a set of buckets")
        return self

    @property
    def by_name(self) -> dict[str, Source]:
        return {source.name: source for source in self.sources}

    def at(self, known: KnownAs) -> At:
        """Where the links of an input lie that is a list of URLs."""
        source = self.by_name[known.source]
        assert isinstance(source, UrlSource)
        return At(links.place(source, known.input, known.sha256, self.fetch), known.generation)

    @property
    def rows(self) -> int:
        """Rows of a planned shard: so many as fill one tar of the smallest size."""
        return self.rows_per_shard or max(1, self._aim // min(map(self._bytes, self.sizes)))

    def shards_of(self, size: Size) -> int:
        """How many tars of this size a planned shard becomes, so that each is near the aim."""
        return max(1, round(self.rows * self._bytes(size) / self._aim))

    @property
    def _aim(self) -> int:
        return self.shard_mib * 2**20

    def _bytes(self, size: Size) -> int:
        side = size.side if isinstance(size, Buckets) else size
        return max(1, int(side**2 * BYTES_PER_PIXEL[self.format]))


class KnownAs(NamedTuple):
    """An input's identity: its name and its content."""

    source: str
    input: str
    sha256: str
    generation: int  # 0; the n-th retry of its failed downloads is generation n


class PlannedShard(NamedTuple):
    number: int
    source: str
    sha256: str
    generation: int
    expected: int  # rows; an estimate where they are not `counted`
    part: Range

    @property
    def known_as(self) -> KnownAs:
        return KnownAs(self.source, self.part.input, self.sha256, self.generation)

    @property
    def counted(self) -> bool:
        """False for a range of a tar, whose members are not counted before it is read."""
        return isinstance(self.part, Rows)


class Edition(Record):
    """The inputs that a run found. The settings are the plan's, whose digest is made of them."""

    inputs: list[KnownAs]
    sizes: dict[str, int]  # name -> how many shards of this size a planned shard becomes
    settings: dict[str, Any]  # those that change results

    @property
    def name(self) -> str:
        return digest([self.inputs, self.sizes])


@dataclass(frozen=True)
class Plan:
    digest: str
    edition: str
    inputs: list[KnownAs]
    shards: list[PlannedShard]
    planned: int  # shards of all editions
    sizes: dict[str, int]
    settings: dict[str, Any]

    @property
    def rows(self) -> int:
        return sum(shard.expected for shard in self.shards)

    def numbers(self, shard: PlannedShard, size: str) -> range:
        """The numbers of the shards of a size that a planned shard becomes.

        Where it becomes three (`sizes` has 3), planned shard 2 becomes the shards 6, 7 and 8.
        """
        count = self.sizes[size]
        return range(shard.number * count, (shard.number + 1) * count)

    def beside(self, number: int, size: str, other: str) -> range:
        """The numbers of the shards of another size that are made of the planned shard of shard `number` of a size."""
        planned, count = number // self.sizes[size], self.sizes[other]
        return range(planned * count, (planned + 1) * count)

    def all_numbers(self, size: str) -> set[int]:
        """The numbers of all shards of a size in this edition."""
        if size not in self.sizes:
            raise DataError(f"plan {self.digest} has no shards of size {size}", remedy="prepare that size first")
        return {number for shard in self.shards for number in self.numbers(shard, size)}

    def records(self, store: Store, size: str) -> Iterator[ShardRecord]:
        """The records that are in the store, by number."""
        return list_shards(store, shard_prefix(self.digest, size), self.all_numbers(size))


class Generation(NamedTuple):
    """An input as a whole (generation 0), or those of its rows whose download is tried again."""

    source: Source
    input: Input
    number: int = 0
    again: RetryRecord | None = None

    @property
    def known_as(self) -> KnownAs:
        return KnownAs(self.source.name, self.input.name, self.input.sha256, self.number)


def make_plan(store: Store, settings: PrepareSettings) -> Plan:
    """The plan for these settings and the sources' inputs, extended by those inputs that are new to it."""
    name = digest({"format": FORMAT, "settings": settings.chosen()})
    while True:
        tables = list(layout.PLANNED.keys(store, plan=name))
        planned = [shard for key in tables for shard in _read(store, key)]
        generations = list(_generations(store, settings, planned))
        known = {shard.known_as for shard in planned}
        unplanned = [generation for generation in generations if generation.known_as not in known]
        fresh = list(_shards(store, settings, unplanned, len(planned)))
        if not fresh:
            break
        # If another run has written this table first, the next round reads theirs and adds what it lacks.
        store.create(layout.PLANNED.at(plan=name, number=len(tables)), _to_parquet(fresh))
    edition = Edition(
        inputs=[generation.known_as for generation in generations],
        sizes={size_name(size): settings.shards_of(size) for size in settings.sizes},
        settings=settings.results(),
    )
    _check_captions(store, settings, name, edition, planned)
    plan = _plan(name, edition.name, edition, planned)
    if not plan.shards:
        raise DataError("the sources hold no images", remedy="check each source's `url`, `tables` and suffixes")
    write_record(store, layout.EDITION.at(plan=name, edition=plan.edition), edition)
    return plan


def read_plan(store: Store, name: str, edition: str) -> Plan:
    record = read_record(store, layout.EDITION.at(plan=name, edition=edition), Edition)
    planned = [shard for key in layout.PLANNED.keys(store, plan=name) for shard in _read(store, key)]
    return _plan(name, edition, record, planned)


def all_shards(store: Store, plan: Plan, size: str) -> list[ShardRecord]:
    """The records of all shards of the plan's edition at a size; an error if one is missing."""
    planned = len(plan.all_numbers(size))
    shards = list(plan.records(store, size))
    if len(shards) < planned:
        raise DataError(
            f"only {len(shards)} of {planned} shards are there",
            remedy="run prepare again; if it says that all is done, `pixnerd data verify --drop-damaged` first",
        )
    return shards


def _plan(name: str, edition: str, record: Edition, planned: list[PlannedShard]) -> Plan:
    inputs = set(record.inputs)
    shards = [shard for shard in planned if shard.known_as in inputs]
    return Plan(name, edition, record.inputs, shards, len(planned), record.sizes, record.settings)


def _check_captions(
    store: Store, settings: PrepareSettings, name: str, edition: Edition, planned: list[PlannedShard]
) -> None:
    """Refuse tables of captions that changed since their tars were planned: the change would go unnoticed.

    New tables may be added; a warning says so if they do not concern the tars that are planned already.
    """
    joined = {source.name for source in settings.sources if source.joins_tables}
    tars = {(shard.source, shard.part.input) for shard in planned}
    now = {known[:2]: known.sha256 for known in edition.inputs if known.source in joined and known[:2] not in tars}
    earlier: set[KnownAs] = set()
    for key in layout.EDITION.keys(store, plan=name) if now else ():
        earlier.update(read_record(store, key, Edition).inputs)
    for known in sorted(earlier):
        if now.get(known[:2], known.sha256) != known.sha256:
            raise SettingsError(
                f"`{known.input}` of the source `{known.source}` has changed since it was planned",
                remedy="give the source another name: then all of it is prepared with the captions of now",
            )
    new = Counter(source for source, _ in now.keys() - {known[:2] for known in earlier})
    old = Counter(known.source for known in earlier.intersection(edition.inputs) if known[:2] in tars)
    for source in sorted(new.keys() & old.keys()):
        _log.warning(
            "the new tables of captions of the source `%s` (%d) are not for its tars that are planned already (%d): "
            "their images without a caption stay refused; give the source another name, then all of it is prepared "
            "with the captions of now",
            source,
            new[source],
            old[source],
        )


def _generations(store: Store, settings: PrepareSettings, planned: list[PlannedShard]) -> Iterator[Generation]:
    for source in settings.sources:
        parts = [shard.part for shard in planned if shard.source == source.name and not shard.generation]
        for input_ in source.inputs(store, parts):
            first = Generation(source, input_)
            yield first
            if isinstance(source, UrlSource):
                place = settings.at(first.known_as).place
                for number, again in enumerate(retries(store, place), start=1):
                    yield Generation(source, input_, number, again)


def _shards(
    store: Store, settings: PrepareSettings, generations: Sequence[Generation], number: int
) -> Iterator[PlannedShard]:
    """The planned shards of these generations, numbered from `number` on."""
    for source, input_, generation, again in generations:
        parts = list(_parts(store, settings.rows, source, input_, again))
        for part in parts:
            expected = _expected(part, parts[0], settings.rows)
            yield PlannedShard(number, source.name, input_.sha256, generation, expected, part)
            number += 1


def _expected(part: Range, first: Range, rows: int) -> int:
    """How many items a part is planned to hold; for a part of a tar an estimate by its bytes."""
    if isinstance(part, Rows):
        return part.rows
    assert isinstance(first, Bytes)
    return max(1, round(rows * part.size / first.size))


def _parts(store: Store, rows: int, source: Source, input_: Input, again: RetryRecord | None) -> Iterator[Range]:
    if again is None:
        yield from source.ranges(store, input_, rows)
        return
    assert isinstance(source, UrlSource)
    table = rows_again(store, source, next(source.ranges(store, input_, rows)), again)
    for first in range(0, again.rows, rows):
        yield Rows(input_.name, table, True, first, min(rows, again.rows - first))


def _read(store: Store, key: str) -> Iterator[PlannedShard]:
    try:
        rows = pq.read_table(pa.BufferReader(store.get(key)), schema=PLAN_SCHEMA).to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{store.url}/{key} is not a readable plan ({type(error).__name__})",
            remedy="delete it, then run prepare again: it is planned once more",
        ) from None
    for row in rows:
        kind = Rows if row.pop("counted") else Bytes
        yield PlannedShard(part=kind._make(row.pop(name) for name in RANGE), **row)


def _to_parquet(shards: Sequence[PlannedShard]) -> bytes:
    rows = [
        {**shard._asdict(), "counted": shard.counted, **dict(zip(RANGE, shard.part, strict=True))} for shard in shards
    ]
    return parquet_bytes(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))

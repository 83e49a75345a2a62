"""The plan: which shard is made of which rows, decided before any work, extended by new inputs and never changed.

    plans/<digest>/00000.parquet     the shards of the inputs that were there first
    plans/<digest>/00001.parquet     those of inputs that came later, and so on
    plans/<digest>/<edition>.json    which inputs a run found: their shards are what it makes

The digest is that of the settings that change results, so other settings are another place. A planned shard is a range
of one input file, never across inputs; an input is known by its content, so one that changed is another input, and the
shards of the old one stay where they are but are in no later edition.

A planned shard becomes one tar at the size that holds most of its rows in 256 MiB, and several at larger sizes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from data_prep.images.sizes import Buckets, Format, Size, Subsampling, size_name
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

FORMAT = 4  # of the shards: raised when the same input and settings would give other bytes

# Bytes of a photograph's pixel, encoded, by format, at the default quality; measured, and good for an aim.
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
RANGE = ("input", "table", "in_store", "first", "rows")  # the columns of a range; of a tar, `rows` are bytes

Level = Annotated[int, Field(ge=0, le=255)]


class PrepareSettings(Settings):
    sources: list[AnySource] = Field(min_length=1)
    sizes: list[Size] = Field([256], min_length=1, description="square sides and bucket sets, all from one decode")
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
        256, ge=1, le=1 << 20, description="what a shard's size is aimed at, by the pixels of an image"
    )
    rows_per_shard: int | None = Field(
        None, ge=1, le=1_000_000, description="of the smallest size, in place of the aim"
    )
    fetch: FetchSettings = FetchSettings()
    keep_originals: bool = operational(True, description="of downloads, so that another size needs no second one")
    in_flight: int | None = operational(
        None,
        ge=1,
        description="shards made at once, and at most so many tasks that download; none: twice the cluster's CPUs",
    )

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, found: list[AnySource]) -> list[AnySource]:
        twice = [name for name, count in Counter(source.name for source in found).items() if count > 1]
        if twice:
            raise ValueError(f"two sources are called `{twice[0]}`: keys are made from the name")
        return found

    @field_validator("sizes")
    @classmethod
    def _distinct_sizes(cls, found: list[Size]) -> list[Size]:
        if len(set(map(size_name, found))) < len(found):
            raise ValueError("two sizes have the same name")
        return found

    @property
    def by_name(self) -> dict[str, Source]:
        return {source.name: source for source in self.sources}

    def at(self, given: KnownAs) -> At:
        """Where it is told what the rows of an input are made of, which is a list of URLs."""
        source = self.by_name[given.source]
        assert isinstance(source, UrlSource)
        return At(links.place(source, given.input, given.sha256, self.fetch), given.generation)

    @property
    def rows(self) -> int:
        """Of a planned shard: what fills a shard of the smallest size."""
        return self.rows_per_shard or max(1, self._aim // min(map(self._bytes, self.sizes)))

    def shards_of(self, size: Size) -> int:
        """How many shards of this size a planned one becomes, so that each is near the aim."""
        return max(1, round(self.rows * self._bytes(size) / self._aim))

    @property
    def _aim(self) -> int:
        return self.shard_mib * 2**20

    def _bytes(self, size: Size) -> int:
        side = size.side if isinstance(size, Buckets) else size
        return max(1, int(side**2 * BYTES_PER_PIXEL[self.format]))


class KnownAs(NamedTuple):
    """An input's identity: that of its content, under its name."""

    source: str
    input: str
    sha256: str
    generation: int  # 0, and one more for each retry of its failed downloads


class PlannedShard(NamedTuple):
    number: int
    source: str
    sha256: str
    generation: int
    expected: int  # rows
    part: Range

    @property
    def known_as(self) -> KnownAs:
        return KnownAs(self.source, self.part.input, self.sha256, self.generation)

    @property
    def counted(self) -> bool:
        """False for a range of a tar, whose members nobody has counted: then `expected` is an estimate."""
        return isinstance(self.part, Rows)


class Edition(Record):
    """What a run found. Its settings are those of the plan, which is called after them."""

    inputs: list[KnownAs]
    sizes: dict[str, int]  # name -> how many shards of it a planned one becomes
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
    planned: int  # shards in all editions
    sizes: dict[str, int]
    settings: dict[str, Any]

    @property
    def rows(self) -> int:
        return sum(shard.expected for shard in self.shards)

    def numbers(self, shard: PlannedShard, size: str) -> range:
        """Of the shards that a planned one becomes."""
        each = self.sizes[size]
        return range(shard.number * each, (shard.number + 1) * each)

    def without_shards(self) -> Plan:
        """For a task that makes one of them: 36,000 need not travel with it."""
        return replace(self, shards=[])

    def all_numbers(self, size: str) -> set[int]:
        """Of all shards of the edition."""
        if size not in self.sizes:
            raise DataError(f"plan {self.digest} has no shards of size {size}", remedy="prepare that size first")
        return {number for shard in self.shards for number in self.numbers(shard, size)}

    def records(self, store: Store, size: str) -> Iterator[ShardRecord]:
        """Those that are there, by number."""
        return list_shards(store, shard_prefix(self.digest, size), self.all_numbers(size))


def edition_key(plan: str, edition: str) -> str:
    return layout.EDITION.at(plan=plan, edition=edition)


class Given(NamedTuple):
    """An input; or, in a later generation, those of its rows whose download is tried again."""

    source: Source
    input: Input
    generation: int = 0
    again: RetryRecord | None = None

    @property
    def known_as(self) -> KnownAs:
        return KnownAs(self.source.name, self.input.name, self.input.sha256, self.generation)


def make_plan(store: Store, settings: PrepareSettings) -> Plan:
    """The plan for these settings and for what the sources hold, extended by the inputs that it did not know."""
    name = digest({"format": FORMAT, "settings": settings.chosen()})
    while True:
        extensions = _extensions(store, name)
        planned = [shard for key in extensions for shard in _read(store, key)]
        given = list(_given(store, settings, planned))
        known = {shard.known_as for shard in planned}
        fresh = list(_shards(store, settings, [new for new in given if new.known_as not in known], len(planned)))
        if not fresh:
            break
        # Whoever extends it first has extended it for all; the next round reads what they wrote.
        store.create(layout.PLANNED.at(plan=name, number=len(extensions)), _to_parquet(fresh))
    edition = Edition(
        inputs=[here.known_as for here in given],
        sizes={size_name(size): settings.shards_of(size) for size in settings.sizes},
        settings=settings.results(),
    )
    _check_captions(store, settings, name, edition, planned)
    plan = _plan(name, edition.name, edition, planned)
    if not plan.shards:
        raise DataError("the sources hold no images", remedy="check each source's `url`, `tables` and suffixes")
    write_record(store, edition_key(name, plan.edition), edition)
    return plan


def read_plan(store: Store, name: str, edition: str) -> Plan:
    found = read_record(store, edition_key(name, edition), Edition)
    return _plan(name, edition, found, [shard for key in _extensions(store, name) for shard in _read(store, key)])


def _extensions(store: Store, name: str) -> list[str]:
    """The keys of a plan's tables, each of which adds shards to those before it."""
    return list(layout.PLANNED.keys(store, plan=name))


def all_shards(store: Store, plan: Plan, size: str) -> list[ShardRecord]:
    """Those of the plan's edition, which must all be there."""
    planned = len(plan.all_numbers(size))
    shards = list(plan.records(store, size))
    if len(shards) < planned:
        raise DataError(
            f"only {len(shards)} of {planned} shards are there",
            remedy="run prepare again; if it says that all is done, `pixnerd data verify --drop-damaged` first",
        )
    return shards


def _plan(name: str, edition: str, found: Edition, planned: list[PlannedShard]) -> Plan:
    active = set(found.inputs)
    shards = [shard for shard in planned if shard.known_as in active]
    return Plan(name, edition, found.inputs, shards, len(planned), found.sizes, found.settings)


def _check_captions(
    store: Store, settings: PrepareSettings, name: str, edition: Edition, planned: list[PlannedShard]
) -> None:
    """Tables of captions may be added to tars that are planned already; one that changed would go unnoticed."""
    joined = {source.name for source in settings.sources if source.joins_tables}
    tars = {(shard.source, shard.part.input) for shard in planned}
    now = {given[:2]: given.sha256 for given in edition.inputs if given.source in joined and given[:2] not in tars}
    earlier: set[KnownAs] = set()
    for key in layout.EDITION.keys(store, plan=name) if now else ():
        earlier.update(read_record(store, key, Edition).inputs)
    for given in sorted(earlier):
        if now.get(given[:2], given.sha256) != given.sha256:
            raise SettingsError(
                f"`{given.input}` of the source `{given.source}` has changed since it was planned",
                remedy="give the source another name: then all of it is prepared with the captions of now",
            )
    new = Counter(source for source, _ in now.keys() - {given[:2] for given in earlier})
    old = Counter(given.source for given in earlier.intersection(edition.inputs) if given[:2] in tars)
    for source in sorted(new.keys() & old.keys()):
        _log.warning(
            "the new tables of captions of the source `%s` (%d) are not for its tars that are planned already (%d): "
            "their images without a caption stay refused; give the source another name, then all of it is prepared "
            "with the captions of now",
            source,
            new[source],
            old[source],
        )


def _given(store: Store, settings: PrepareSettings, planned: list[PlannedShard]) -> Iterator[Given]:
    for source in settings.sources:
        before = [shard.part for shard in planned if shard.source == source.name and not shard.generation]
        for found in source.inputs(store, before):
            first = Given(source, found)
            yield first
            if isinstance(source, UrlSource):
                place = settings.at(first.known_as).place
                for generation, again in enumerate(retries(store, place), start=1):
                    yield Given(source, found, generation, again)


def _shards(store: Store, settings: PrepareSettings, given: Sequence[Given], number: int) -> Iterator[PlannedShard]:
    for here in given:
        parts = list(_parts(store, settings, here))
        for part in parts:
            expected = _expected(part, parts[0], settings.rows)
            yield PlannedShard(number, here.source.name, here.input.sha256, here.generation, expected, part)
            number += 1


def _expected(part: Range, first: Range, rows: int) -> int:
    """How many items a piece is planned to hold; of a tar's piece this is an estimate by its bytes."""
    if isinstance(part, Rows):
        return part.rows
    assert isinstance(first, Bytes)
    return max(1, round(rows * part.size / first.size))


def _parts(store: Store, settings: PrepareSettings, here: Given) -> Iterator[Range]:
    if here.again is None:
        yield from here.source.ranges(store, here.input, settings.rows)
        return
    assert isinstance(here.source, UrlSource)
    first_part = next(here.source.ranges(store, here.input, settings.rows))
    table = rows_again(store, here.source, first_part, here.again)
    for first in range(0, here.again.rows, settings.rows):
        rows = min(settings.rows, here.again.rows - first)
        yield Rows(here.input.name, table, True, first, rows)


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

"""The plan: which shard is made of which rows, decided before any work and never changed.

A shard is a row range of one input file, never across inputs. The plan's name is the digest of the inputs and of the
settings that change results, so the same corpus and settings find the same plan, and anything else finds another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from data_prep.sources import Input, Range, Source, as_rows, inputs
from infra.config import Settings, canonical_json, digest, operational
from infra.errors import DataError
from infra.shards import parquet_bytes
from infra.store import Store

FORMAT = 1  # of the shards: raised when the same input and settings would give other bytes

PLAN_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("in_store", pa.bool_(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
    ]
)


Level = Annotated[int, Field(ge=0, le=255)]


class PrepareSettings(Settings):
    sources: list[Source] = Field(min_length=1)
    sizes: list[int] = Field([256], min_length=1, description="sides of the square images, all made from one decode")
    jpeg_quality: int = Field(95, ge=1, le=100)
    jpeg_subsampling: Literal["444", "422", "420"] = "444"
    matte: tuple[Level, Level, Level] = Field((255, 255, 255), description="the colour under transparency")
    max_pixels: int = Field(80_000_000, ge=1, description="larger pictures are refused before they are decoded")
    rows_per_shard: int = Field(2048, ge=1)
    in_flight: int | None = operational(None, ge=1, description="tasks at once; none: twice the cluster's CPUs")

    @field_validator("sources")
    @classmethod
    def _distinct_names(cls, found: list[Source]) -> list[Source]:
        twice = [name for name, count in Counter(source.name for source in found).items() if count > 1]
        if twice:
            raise ValueError(f"two sources are called `{twice[0]}`: keys are made from the name")
        return found

    @field_validator("sizes")
    @classmethod
    def _distinct_sizes(cls, found: list[int]) -> list[int]:
        if len(set(found)) < len(found) or min(found) < 8:
            raise ValueError("sizes are different from one another and at least 8")
        return found


class PlannedShard(NamedTuple):
    number: int
    source: str
    part: Range


@dataclass(frozen=True)
class Plan:
    digest: str
    shards: list[PlannedShard]
    settings: str  # canonical JSON of the settings that change results

    @property
    def rows(self) -> int:
        return sum(shard.part.rows for shard in self.shards)


def plan_key(plan: str) -> str:
    return f"plans/{plan}.parquet"


def make_plan(store: Store, settings: PrepareSettings) -> Plan:
    """The plan for these settings; planned and stored if it is new, read back if it is not."""
    found = [(source, inputs(source)) for source in settings.sources]
    results = settings.results()
    work = {"format": FORMAT, "settings": results, "inputs": [[source.name, here] for source, here in found]}
    name = digest(work)
    if not store.exists(plan_key(name)):
        shards = list(_shards(store, found, settings.rows_per_shard))
        if not shards:
            raise DataError("the sources hold no images", remedy="check each source's `url`, `tables` and suffixes")
        store.create(plan_key(name), _to_parquet(shards, results))
    return read_plan(store, name)


def read_plan(store: Store, name: str) -> Plan:
    table = pq.read_table(pa.BufferReader(store.get(plan_key(name))))
    shards = [PlannedShard(row.pop("number"), row.pop("source"), Range(**row)) for row in table.to_pylist()]
    return Plan(name, shards, table.schema.metadata[b"settings"].decode())


def _shards(store: Store, found: Sequence[tuple[Source, list[Input]]], size: int) -> Iterator[PlannedShard]:
    number = 0
    for source, here in found:
        for planned in here:
            rows = as_rows(source, store, planned.name)
            if rows is None:
                continue
            for first in range(0, rows.rows, size):
                part = Range(planned.name, rows.table, rows.in_store, first, min(size, rows.rows - first))
                yield PlannedShard(number, source.name, part)
                number += 1


def _to_parquet(shards: Sequence[PlannedShard], results: dict[str, Any]) -> bytes:
    rows = [{"number": shard.number, "source": shard.source, **shard.part._asdict()} for shard in shards]
    schema = PLAN_SCHEMA.with_metadata({"settings": canonical_json(results)})
    return parquet_bytes(pa.Table.from_pylist(rows, schema=schema))

"""The settings of a snapshot, and a check that they fit each other and the sources of the shards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated

from pydantic import Field, field_validator

from data_prep.snapshots import dedup
from data_prep.snapshots.captions import Mix, rules_of
from data_prep.snapshots.filters import LONGEST, columns_in, suggestion
from data_prep.sources.reading import READERS
from infra.config import Settings, operational
from infra.problems import Wrong

Times = Annotated[float, Field(ge=0, le=100)]


class LabelSettings(Settings):
    column: str = Field("label", description="a column of whole numbers that the sources keep; the first label is 0")
    classes: int = Field(ge=1, description="how many there are; a label that is not below it is an error")


class SnapshotSettings(Settings):
    size: int | str = Field(256, description="one of the sizes that were prepared: a side, or a bucket set's name")
    filter: str = Field("", max_length=LONGEST)
    duplicates: int | None = Field(
        None,
        ge=0,
        le=dedup.FARTHEST,
        description="the filter's `duplicate` also means images whose perceptual hashes differ in at most so many bits",
    )
    scores: list[str] = Field(
        [],
        description="digests of scores and captions that are joined to the index; DIGEST@256: those made at size 256",
    )
    weights: dict[str, Times] = Field({}, description="source -> how often training lists each of its samples (1)")
    captions: Mix = Field({}, description="kind -> weight, or a list of rules; none: all kinds alike")
    labels: LabelSettings | None = Field(
        None, description="for training by labels: rows without one are left out, and captions are not asked for"
    )
    held_out: float = Field(0.0, ge=0, lt=1, description="fraction of the samples that training never sees")
    readers: int = operational(READERS, ge=1, description="shards that are read at once")

    @field_validator("scores")
    @classmethod
    def _distinct(cls, digests: list[str]) -> list[str]:
        if len(set(digests)) < len(digests):
            raise ValueError("one of the scores is named twice")
        return digests

    @field_validator("size")
    @classmethod
    def _side(cls, size: int | str) -> int | str:
        return int(size) if isinstance(size, str) and size.isascii() and size.isdigit() else size


def wrongs(settings: SnapshotSettings, sources: Collection[str]) -> Iterator[Wrong]:
    """Settings that contradict each other, or that name a source which the shards do not have."""
    if settings.duplicates is not None and "duplicate" not in columns_in(settings.filter):
        yield Wrong(
            "duplicates", "is set, but the filter does not ask", "add `not duplicate` to the filter, or unset it"
        )
    weights = [(f"weights.{name}", name) for name in settings.weights]
    rules = [(f"captions.{number}.source", rule.source) for number, rule in enumerate(rules_of(settings.captions))]
    for field, name in [*weights, *rules]:
        if name is not None and name not in sources:
            remedy = suggestion(name, sources, "sources")
            yield Wrong(field, f"means a source called `{name}`, of which there are no shards", remedy)

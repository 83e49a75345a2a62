"""Counts of the rows that each step of a snapshot leaves, by source and by shard, and the error if none is left."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.rejections import counted, remedy
from data_prep.snapshots.captions import Ints, rules_of
from data_prep.snapshots.filters import suggestion
from data_prep.snapshots.settings import SnapshotSettings
from infra.errors import DataError, SettingsError
from infra.shards import parquet_bytes

# The steps after which rows are counted, besides the filter's conditions, and the remedy if a step leaves no row.
ACCEPTED, REMEMBERED, MIXED = "accepted", "not forgotten", "has a caption of the mix"
LABELLED, WEIGHTED, HELD_OUT = "has a label", "as often as its source weighs", "not held out"
REMEDIES = {
    ACCEPTED: "check each source's `url`, and what lies there",
    REMEMBERED: "prepare images that nobody asked to forget",
    MIXED: "give `captions` a kind, a source or a length that they have",
    LABELLED: "name the column in `labels.column` that holds them",
    WEIGHTED: "give `weights` more for the sources that are left",
    HELD_OUT: "lower `held_out`, or prepare more images",
}

BY_SHARD = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("accepted", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("held_out_rows", pa.int64(), nullable=False),
    ]
)


class Part(NamedTuple):
    """The rows that a snapshot selects from one shard, and the counts of each step."""

    training: pa.RecordBatch
    held_out: pa.RecordBatch
    by_source: dict[str, list[int]]  # source -> rows left after each step
    by_shard: list[dict[str, Any]]  # rows of BY_SHARD
    kinds: set[str]  # of the shard's captions
    shares: dict[str, float]  # caption rule -> the sum of its weights over all rows of `training`


class Tally:
    """The sums of the counts of all parts."""

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self._by_source: dict[str, Ints] = {}
        self._by_shard: list[pa.Table] = []
        self._kinds: set[str] = set()
        self._shares: Counter[str] = Counter()
        self._training = self._held_out = 0  # rows

    def add(self, part: Part) -> None:
        for name, counts in part.by_source.items():
            self._by_source[name] = self._by_source.get(name, 0) + np.array(counts)
        self._by_shard.append(pa.Table.from_pylist(part.by_shard, schema=BY_SHARD))
        self._kinds |= part.kinds
        self._shares.update(part.shares)
        self._training += part.training.num_rows
        self._held_out += part.held_out.num_rows

    def counts(self) -> list[tuple[str, int]]:
        total = sum(self._by_source.values(), np.zeros(len(self.steps), np.int64))
        return [(step, int(count)) for step, count in zip(self.steps, total, strict=True)]

    def by_source(self) -> dict[str, list[int]]:
        return {name: counts.tolist() for name, counts in sorted(self._by_source.items())}

    def by_shard(self) -> bytes:
        return parquet_bytes(pa.concat_tables([BY_SHARD.empty_table(), *self._by_shard]).combine_chunks())

    def caption_shares(self) -> dict[str, float]:
        total = sum(self._shares.values())
        return {label: round(share / total, 6) for label, share in sorted(self._shares.items())} if total else {}

    def check(self, settings: SnapshotSettings, rejected: Counter[str]) -> None:
        """Raise an error if no row is left for training, or if no caption has a kind that the mix names."""
        counts = self.counts()
        chosen = MIXED if MIXED in self.steps else LABELLED
        before = counts[self.steps.index(chosen) - 1][1]
        for rule in rules_of(settings.captions):
            if before and rule.kind is not None and rule.kind not in self._kinds:
                raise SettingsError(
                    f"no sample has a caption of the kind `{rule.kind}`",
                    remedy=suggestion(rule.kind, self._kinds, "kinds"),
                )
        if not self._training:
            raise self._nothing_left(counts, rejected)

    def _nothing_left(self, counts: list[tuple[str, int]], rejected: Counter[str]) -> DataError:
        """An error that names the step after which training has no sample."""
        selected = dict(counts)[MIXED if MIXED in self.steps else LABELLED]
        if selected and selected == self._held_out:
            counts = [*counts, (HELD_OUT, 0)]
        elif selected:
            counts = [*counts[:-1], (WEIGHTED, 0)]
        step = next(label for label, count in counts if not count)
        if step == ACCEPTED and rejected:
            return DataError(f"no image was accepted at this size: {counted(rejected)}", remedy=remedy(rejected))
        steps = ", ".join(f"{label}: {count:,}" for label, count in counts)
        return DataError(
            f"no sample is left for training after `{step}` ({steps})",
            remedy=REMEDIES.get(step, "loosen that condition of the filter, or leave it out"),
        )

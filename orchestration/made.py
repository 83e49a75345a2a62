"""What workflows have made in a store, found by the names of stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from infra import layout
from infra.errors import CheckpointError, DataError, SettingsError
from infra.records import PrepareSummary, ScoreSummary, SnapshotOutput, StageRecord, TrainOutput, read_record
from infra.store import Store


def stage_records(store: Store, kind: str) -> list[StageRecord]:
    """In the order in which they were begun."""
    found = [read_record(store, key, StageRecord) for key in layout.STAGE.keys(store, kind=kind)]
    return sorted(found, key=lambda record: record.started)


class Prepared(NamedTuple):
    """What a prepare stage made last."""

    stage: str
    plan: str
    edition: str
    sizes: list[str]


def prepared(store: Store) -> list[Prepared]:
    """The newest edition of every plan."""
    newest: dict[str, Prepared] = {}
    for record in stage_records(store, "prepare"):
        made = record.of(PrepareSummary)
        newest[made.plan] = Prepared(record.stage, made.plan, made.edition, list(made.sizes))
    if not newest:
        raise DataError(f"nothing has been prepared in {store.url}", remedy="run `pixnerd prepare` first")
    return list(newest.values())


def sizes_of(all_prepared: list[Prepared], size: str | None) -> list[tuple[Prepared, str]]:
    chosen = [(found, one) for found in all_prepared for one in found.sizes if size in (None, one)]
    if not chosen:
        known = sorted({one for found in all_prepared for one in found.sizes})
        raise SettingsError(f"nothing was prepared at the size `{size}`", remedy=f"sizes: {', '.join(known)}")
    return chosen


def scores_of(store: Store, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Plan, size and scorer of the scores that are called so: by their stage, whose last ones they are, or a digest."""
    made = [(record.stage, record.of(ScoreSummary)) for record in stage_records(store, "score")] if names else []
    for name in names:
        if not any(name in (stage, scores.scorer) for stage, scores in made):
            known = ", ".join(sorted({stage for stage, _ in made}))
            raise SettingsError(
                f"there are no scores called `{name}` in {store.url}",
                remedy=f"scores: {known}" if known else "run a recipe with a `score` stage first",
            )
    newest = {(stage, scores.plan, scores.size): scores.scorer for stage, scores in made if stage in names}
    by_stage = [(plan, size, scorer) for (_, plan, size), scorer in newest.items()]
    by_digest = [(scores.plan, scores.size, scores.scorer) for _, scores in made if scores.scorer in names]
    return list(dict.fromkeys([*by_stage, *by_digest]))


def snapshot_key(store: Store, name: str) -> str:
    """The key of a snapshot: of the last one that a stage of this name made, or of the one with this digest."""
    made = [(record.stage, record.of(SnapshotOutput).record) for record in stage_records(store, "snapshot")]
    found = [key for stage, key in made if name in (stage, key, Path(key).stem)]
    if not found:
        known = ", ".join(dict.fromkeys(stage for stage, _ in made))
        raise SettingsError(
            f"there is no snapshot called `{name}` in {store.url}",
            remedy=f"snapshots: {known}" if known else "run a recipe with a `snapshot` stage first",
        )
    return found[-1]


def checkpoint_key(store: Store, stage: str) -> str:
    """The key of the newest checkpoint of a train stage."""
    made = [(record.stage, record.of(TrainOutput).record) for record in stage_records(store, "train")]
    found = [key for name, key in made if name == stage]
    if not found:
        known = sorted({name for name, _ in made})
        raise CheckpointError(
            f"{store.url} holds no checkpoint of a stage `{stage}`",
            remedy=f"it has {', '.join(known) or 'none at all'}",
        )
    return found[-1]


def makes_again(key: str) -> bool:
    """Whether it was the record of a stage that a workflow runs again, and `prepare` alone does not."""
    parts = layout.STAGE.parse(key)
    return parts is not None and parts["kind"] in (ScoreSummary.kind, SnapshotOutput.kind)

"""What workflows have made in a store, looked up by the names of stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from infra import layout
from infra.errors import CheckpointError, DataError, SettingsError
from infra.problems import did_you_mean
from infra.records import (
    CheckpointRecord,
    EvalReport,
    EvaluateOutput,
    PrepareSummary,
    ScoreSummary,
    SnapshotOutput,
    StageRecord,
    TrainOutput,
    read_record,
)
from infra.store import Store, open_store


def stage_records(store: Store, kind: str) -> list[StageRecord]:
    """The records of all stages of a kind, the first that was started first."""
    records = (read_record(store, key, StageRecord) for key in layout.STAGE.keys(store, kind=kind))
    return sorted(records, key=lambda record: record.started)


class Prepared(NamedTuple):
    """The newest edition of a plan, and the prepare stage that made it."""

    stage: str
    plan: str
    edition: str
    sizes: list[str]


def prepared(store: Store) -> list[Prepared]:
    """The newest edition of every plan."""
    newest: dict[str, Prepared] = {}
    for record in stage_records(store, "prepare"):
        summary = record.of(PrepareSummary)
        newest[summary.plan] = Prepared(record.stage, summary.plan, summary.edition, list(summary.sizes))
    if not newest:
        raise DataError(f"nothing has been prepared in {store.url}", remedy="run `pixnerd prepare` first")
    return list(newest.values())


def sizes_of(all_prepared: list[Prepared], size: str | None) -> list[tuple[Prepared, str]]:
    """Each plan with each of its sizes; of one size only, if that is given."""
    chosen = [(plan, plan_size) for plan in all_prepared for plan_size in plan.sizes if size in (None, plan_size)]
    if not chosen:
        known = sorted({plan_size for plan in all_prepared for plan_size in plan.sizes})
        raise SettingsError(f"nothing was prepared at the size `{size}`", remedy=f"sizes: {', '.join(known)}")
    return chosen


def scores_of(store: Store, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Plan, size and scorer of each of the named scores.

    A name is that of a score stage, and means its newest scores of each plan and size; or the digest of a scorer.
    """
    summaries = [(record.stage, record.of(ScoreSummary)) for record in stage_records(store, "score")] if names else []
    for name in names:
        if not any(name in (stage, scores.scorer) for stage, scores in summaries):
            known = ", ".join(sorted({stage for stage, _ in summaries}))
            raise SettingsError(
                f"there are no scores called `{name}` in {store.url}",
                remedy=f"scores: {known}" if known else "run a recipe with a `score` stage first",
            )
    newest = {(stage, scores.plan, scores.size): scores.scorer for stage, scores in summaries if stage in names}
    by_stage = [(plan, size, scorer) for (_, plan, size), scorer in newest.items()]
    by_digest = [(scores.plan, scores.size, scores.scorer) for _, scores in summaries if scores.scorer in names]
    return list(dict.fromkeys([*by_stage, *by_digest]))


def snapshot_key(store: Store, name: str) -> str:
    """The key of the newest snapshot of the stage of this name, or of the snapshot with this digest or key."""
    snapshots = [(record.stage, record.of(SnapshotOutput).record) for record in stage_records(store, "snapshot")]
    keys = [key for stage, key in snapshots if name in (stage, key, Path(key).stem)]
    if not keys:
        known = ", ".join(dict.fromkeys(stage for stage, _ in snapshots))
        raise SettingsError(
            f"there is no snapshot called `{name}` in {store.url}",
            remedy=f"snapshots: {known}" if known else "run a recipe with a `snapshot` stage first",
        )
    return keys[-1]


def checkpoint_key(store: Store, stage: str) -> str:
    """The key of the newest checkpoint of a train stage."""
    checkpoints = [(record.stage, record.of(TrainOutput).record) for record in stage_records(store, "train")]
    keys = [key for name, key in checkpoints if name == stage]
    if not keys:
        known = [*sorted({name for name, _ in checkpoints}), *_on_the_way(store)]
        raise CheckpointError(
            f"{store.url} holds no checkpoint of a stage `{stage}`",
            remedy=f"it has {', '.join(known) or 'none at all'}",
        )
    return keys[-1]


def _on_the_way(store: Store) -> list[str]:
    """The keys of the newest checkpoints of trainings that have not ended."""
    newest: dict[str, str] = {}
    keys = {entry.key for entry in store.list(layout.TRAINING.under())}
    for key in sorted(keys):
        parts = layout.CHECKPOINT_AT.parse(key)
        if parts and layout.CHECKPOINT.at(home=parts["home"]) not in keys:
            newest[parts["home"]] = key
    return list(newest.values())


def network_home(store: Store, name: str) -> str:
    """Where a network lies: that of a train stage's newest checkpoint, or of a record that the run has written.

    A run that is still under way is known by its records alone.
    """
    for place in (layout.CHECKPOINT, layout.CHECKPOINT_AT, layout.AVERAGES):
        if parts := place.parse(name):
            return str(parts["home"])
    return str(layout.CHECKPOINT.parts(checkpoint_key(store, name))["home"])


def checkpoint_at(store: Store, home: str, step: int) -> str:
    """The key of a network's checkpoint at a step, on the way or at the end."""
    last = layout.CHECKPOINT.at(home=home)
    keys = {layout.CHECKPOINT_AT.parts(key)["step"]: key for key in layout.CHECKPOINT_AT.keys(store, home=home)}
    if store.exists(last):
        keys[read_record(store, last, CheckpointRecord).step] = last
    if step not in keys:
        raise CheckpointError(
            f"{store.url}/{home} has no checkpoint of step {step}",
            remedy=f"steps: {', '.join(map(str, sorted(keys)))}" if keys else "train with export_every",
        )
    return keys[step]


def evaluation(name: str, store: str | None) -> tuple[Store, EvalReport]:
    """The newest report of a store's evaluation stage of this name; or the one in a folder or store of its own."""
    if store is None:
        opened = open_store(name)
        keys = list(layout.REPORT.keys(opened))
        if len(keys) != 1:
            raise SettingsError(
                f"{name} holds {len(keys) or 'no'} evaluations",
                remedy="name a stage and its --store"
                if keys
                else "name what `pixnerd evaluate --out` wrote, or --store",
            )
        return opened, read_record(opened, keys[0], EvalReport)
    opened = open_store(store)
    records = [
        record
        for kind in EvaluateOutput.kinds()
        for record in stage_records(opened, kind)
        if isinstance(record.output, EvaluateOutput)
    ]
    found = [record for record in records if record.stage == name]
    if not found:
        known = sorted({record.stage for record in records})
        raise SettingsError(
            f"{opened.url} holds no evaluation `{name}`", remedy=did_you_mean(name, known, f"it has {', '.join(known)}")
        )
    output = max(found, key=lambda record: record.started).of(EvaluateOutput)
    return opened, read_record(opened, output.record, EvalReport)


def makes_again(key: str) -> bool:
    """Whether `pixnerd run` makes the deleted record with this key again, but `pixnerd prepare` does not."""
    parts = layout.STAGE.parse(key)
    return parts is not None and parts["kind"] in (ScoreSummary.kind, SnapshotOutput.kind)

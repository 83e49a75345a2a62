"""Deleting what keeps damaged things from being made again: damaged objects, and records that say that work is done.

    damaged data  ->  records of scores and snapshots that are damaged, or were made of damaged shards
                  ->  the shards' records  ->  summaries and stages that say that all is prepared

Things are deleted in this order, and the records that call scores or a snapshot done before the records of these. So
after a kill on the way, another `verify` finds what is left to do. A damaged object is deleted whatever names it, as it
is of no use; an object whose bytes have the hash in its name stays.

A shard that is made again has other bytes if its decoders have changed. So its scores, and snapshots that list its
images, are made again too; they come out the same if the shard does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from data_prep.prepare import originals
from data_prep.prepare.originals import BatchRecord
from data_prep.sources.reading import tars_in
from data_prep.upkeep.verify import Shared, Verified
from infra import layout
from infra.errors import DataError, NotFound, RecordError, SettingsError
from infra.records import (
    DataObject,
    Output,
    PrepareSummary,
    ScoreSummary,
    SnapshotOutput,
    SnapshotRecord,
    StageRecord,
    read_record,
)
from infra.shards import data_name, shard_number, shard_prefix
from infra.store import Store


def drop(store: Store, plan: str, verified: Verified) -> list[str]:
    """Delete what keeps a plan's damaged shards, scores and snapshots from being made again; return its keys."""
    numbers = defaultdict[str, set[int]](set)
    for key in verified.again:
        parts = layout.SHARD.parts(key)
        numbers[parts["size"]].add(parts["number"])
    scores = [*verified.scores_again, *_scores_of(store, plan, numbers)]
    snapshots = [*verified.snapshots_again, *_snapshots_of(store, plan, numbers)]
    done = [*_with_summaries(store, scores), *_with_stages(store, snapshots)]
    keys = [*verified.objects, *done, *verified.records]
    if verified.again:
        keys += layout.PREPARED.keys(store, plan=plan)
        keys += _stages(store, PrepareSummary, plan=plan)
    return _deleted(store, keys)


def drop_shared(store: Store, shared: Shared) -> list[str]:
    """The same for what belongs to no single plan. Originals are downloaded again where they are needed."""
    keys = _deleted(store, [*shared.objects, *_with_stages(store, shared.snapshots_again), *shared.records])
    for key in shared.tars_again:
        originals.mark_dropped(store, read_record(store, key, BatchRecord))
    return keys


def _deleted(store: Store, keys: Iterable[str]) -> list[str]:
    once = list(dict.fromkeys(keys))
    for key in once:
        if parts := layout.STAGE.parse(key):
            _mark_recorded(store, **parts)
        store.delete(key)
    return once


def _mark_recorded(store: Store, kind: str, digest: str) -> None:
    """Else, if the driver was killed before it said so, whoever finds its commit writes the record again."""
    for end in list(layout.ENDED.keys(store, kind=kind, digest=digest)):
        store.create(layout.RECORDED.at(**layout.ENDED.parts(end)), b"")


def _scores_of(store: Store, plan: str, shards: Mapping[str, Collection[int]]) -> Iterator[str]:
    """The keys of all records of scores of these shards, which are given by size."""
    for size, numbers in shards.items():
        yield from (key for key in layout.SCORE.keys(store, plan=plan, size=size) if shard_number(key) in numbers)


def _with_summaries(store: Store, records: Collection[str]) -> Iterator[str]:
    """These records of scores, and before them the summaries and stages that say that their scorers are done."""
    parsed = (layout.SCORE.parse(key) or layout.SCORED.parse(key) or {} for key in records)
    for plan, size, scorer in dict.fromkeys((parts["plan"], parts["size"], parts["scorer"]) for parts in parsed):
        yield from layout.SCORED.keys(store, plan=plan, size=size, scorer=scorer)
        yield from _stages(store, ScoreSummary, plan=plan, size=size, scorer=scorer)
    yield from filter(store.exists, records)


def _snapshots_of(store: Store, plan: str, shards: Mapping[str, Collection[int]]) -> Iterator[str]:
    """The keys of the records of snapshots that list images of these shards."""
    tars = {
        shard_prefix(plan, size): tuple(data_name(size, number) for number in numbers)
        for size, numbers in shards.items()
    }
    for key in layout.SNAPSHOT.keys(store) if tars else ():
        try:
            record = read_record(store, key, SnapshotRecord)
        except RecordError:  # `verify_shared` reports it
            continue
        names = tars.get(record.shards, ())
        if names and any(_lists(store, part, names) for part in (record.selection, record.held_out)):
            yield key


def _lists(store: Store, selection: DataObject, tars: tuple[str, ...]) -> bool:
    """Whether it lists images of tars whose keys begin so."""
    try:
        return any(name.startswith(tars) for name in tars_in(store, selection))
    except (DataError, NotFound, SettingsError):  # damaged or gone, so that it must be made again in any case
        return True


def _with_stages(store: Store, records: Collection[str]) -> Iterator[str]:
    """These records of snapshots, and before them the records of the stages that made them."""
    for key in records:
        yield from _stages(store, SnapshotOutput, record=key)
    yield from filter(store.exists, records)


def _stages(store: Store, output: type[Output], **values: str) -> Iterator[str]:
    """The keys of the records of stages whose output is of this class and has these values in its fields."""
    for key in layout.STAGE.keys(store, kind=output.kind):
        stage_output = read_record(store, key, StageRecord).of(output)
        if all(getattr(stage_output, name) == value for name, value in values.items()):
            yield key

"""What must go before damaged things can be made again: all that says that they, or what came of them, are there.

    damaged data  ->  what was made of damaged shards, and what is damaged of it  ->  the shards' records
                  ->  what says that all is done

In this order, and of scores and snapshots what says that they are done before their records: whoever is killed on the
way is told by another `verify` what is left to do. Data go whoever names them, as nobody can use them; an object that
has the hash in its name stays. A shard that is made again has other bytes if its decoders have changed since, so its
scores go, and the snapshots that list its images: they are made again, too, and are the very same if the shard is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from data_prep.prepare import originals
from data_prep.prepare.originals import BatchRecord
from data_prep.sources.reading import column
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


def drop(store: Store, plan: str, found: Verified) -> list[str]:
    """Delete what is in the way of making a plan's damaged shards, scores and snapshots again; its keys."""
    numbers = defaultdict[str, set[int]](set)
    for key in found.again:
        parts = layout.SHARD.parts(key)
        numbers[parts["size"]].add(parts["number"])
    scores = [*found.scores_again, *_scores_of(store, plan, numbers)]
    snapshots = [*found.snapshots_again, *_snapshots_of(store, plan, numbers)]
    keys = [*found.objects, *_scored(store, scores), *_listed(store, snapshots), *found.records]
    if found.again:
        keys += layout.PREPARED.keys(store, plan=plan)
        keys += _stages(store, PrepareSummary, plan=plan)
    return _deleted(store, keys)


def drop_shared(store: Store, found: Shared) -> list[str]:
    """The same for what belongs to no plan alone. What was downloaded comes again where it is needed."""
    keys = _deleted(store, [*found.objects, *_listed(store, found.snapshots_again), *found.records])
    for key in found.tars_again:
        originals.mark_dropped(store, read_record(store, key, BatchRecord))
    return keys


def _deleted(store: Store, keys: Iterable[str]) -> list[str]:
    once = list(dict.fromkeys(keys))
    for key in once:
        store.delete(key)
    return once


def _scores_of(store: Store, plan: str, shards: Mapping[str, Collection[int]]) -> Iterator[str]:
    """The records of the scores of these shards, by their sizes."""
    for size, numbers in shards.items():
        yield from (key for key in layout.SCORE.keys(store, plan=plan, size=size) if shard_number(key) in numbers)


def _scored(store: Store, records: Collection[str]) -> Iterator[str]:
    """These records of scores, and before them all that says that their scorers are done."""
    found = (layout.SCORE.parse(key) or layout.SCORED.parse(key) or {} for key in records)
    for plan, size, scorer in dict.fromkeys((parts["plan"], parts["size"], parts["scorer"]) for parts in found):
        yield from layout.SCORED.keys(store, plan=plan, size=size, scorer=scorer)
        yield from _stages(store, ScoreSummary, plan=plan, size=size, scorer=scorer)
    yield from filter(store.exists, records)


def _snapshots_of(store: Store, plan: str, shards: Mapping[str, Collection[int]]) -> Iterator[str]:
    """The records of the snapshots that list images of these shards."""
    tars = {
        shard_prefix(plan, size): tuple(data_name(size, number) for number in numbers)
        for size, numbers in shards.items()
    }
    for key in layout.SNAPSHOT.keys(store) if tars else ():
        try:
            record = read_record(store, key, SnapshotRecord)
        except RecordError:  # of no use to anybody, and told of apart
            continue
        names = tars.get(record.shards, ())
        if names and any(_lists(store, part, names) for part in (record.selection, record.held_out)):
            yield key


def _lists(store: Store, selection: DataObject, tars: tuple[str, ...]) -> bool:
    """Whether it lists images of these tars, which are told by how their names begin."""
    try:
        return any(
            name.startswith(tars) for part in column(store, selection, "tar") for name in part.unique().to_pylist()
        )
    except (DataError, NotFound, SettingsError):  # damaged or gone: of no use to anybody as it is
        return True


def _listed(store: Store, records: Collection[str]) -> Iterator[str]:
    """These records of snapshots, and before them the stages that say that they are there."""
    for key in records:
        yield from _stages(store, SnapshotOutput, record=key)
    yield from filter(store.exists, records)


def _stages(store: Store, output: type[Output], **facts: str) -> Iterator[str]:
    """The records of the stages of a kind that came to this."""
    for key in layout.STAGE.keys(store, kind=output.kind):
        found = read_record(store, key, StageRecord).of(output)
        if all(getattr(found, name) == value for name, value in facts.items()):
            yield key

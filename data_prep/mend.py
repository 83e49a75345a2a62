"""What must go before damaged shards can be made again: all that says that they, or what came of them, are there.

    damaged data  ->  what was made of the shards  ->  the shards' records  ->  what says that all is done

In this order: whoever is killed on the way is told by another `verify` what is left to do. Data go whoever names them,
as nobody can use them; an object that has the hash in its name stays. A shard that is made again has other bytes if
its decoders have changed since, so its scores go, and the snapshots that list its images: they are made again, too,
and are the very same if the shard is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from data_prep.job import summary_prefix
from data_prep.stream import column
from data_prep.verify import Verified
from infra.errors import DataError, NotFound
from infra.records import DataObject, SnapshotRecord, StageRecord, read_record
from infra.shards import data_name, shard_number, shard_prefix
from infra.store import Store


def drop(store: Store, plan: str, found: Verified) -> list[str]:
    """Delete what is in the way of making a plan's damaged shards again, and nothing else; its keys."""
    keys = list(dict.fromkeys([*found.objects, *_made_of(store, plan, found.again), *found.records]))
    keys += [*(entry.key for entry in store.list(summary_prefix(plan))), *_stages(store, "prepare", plan=plan)]
    for key in keys:
        store.delete(key)
    return keys


def _made_of(store: Store, plan: str, shards: Collection[str]) -> Iterator[str]:
    """The records of what was made of these shards, and of the stages that did it."""
    numbers = defaultdict[str, set[int]](set)
    for key in shards:
        numbers[key.split("/")[2]].add(shard_number(key))
    for size, here in numbers.items():
        scores = [entry.key for entry in store.list(f"scores/{plan}/{size}/") if entry.key.endswith(".json")]
        yield from (key for key in scores if shard_number(key) in here)
        yield from (entry.key for entry in store.list(f"scored/{plan}/{size}/"))
        yield from _stages(store, "score", plan=plan, size=size)
        for key in _snapshots(store, shard_prefix(plan, size), tuple(data_name(size, number) for number in here)):
            yield key
            yield from _stages(store, "snapshot", record=key)


def _snapshots(store: Store, shards: str, tars: tuple[str, ...]) -> Iterator[str]:
    """Those that list images of these tars, which are told by how their names begin."""
    for entry in store.list("snapshots/"):
        record = read_record(store, entry.key, SnapshotRecord)
        if record.shards == shards and any(_lists(store, part, tars) for part in (record.selection, record.held_out)):
            yield entry.key


def _lists(store: Store, selection: DataObject, tars: tuple[str, ...]) -> bool:
    try:
        return any(
            name.startswith(tars) for part in column(store, selection, "tar") for name in part.unique().to_pylist()
        )
    except (DataError, NotFound):  # of no use to anybody as it is
        return True


def _stages(store: Store, kind: str, **output: str) -> Iterator[str]:
    """The records of a kind's stages that came to this."""
    for entry in store.list(f"stages/{kind}/"):
        found = read_record(store, entry.key, StageRecord).output
        if all(found.get(name) == value for name, value in output.items()):
            yield entry.key

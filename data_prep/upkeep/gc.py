"""`gc`: delete the data that no record names: what killed jobs left, and what those made whose records came second.

An object under `data/` is named by any JSON record outside of it that holds its key, whatever the record is; by the
table of a plan, which says where its inputs were put as Parquet; and by the selection of a snapshot, which says where
its images lie. All others are orphans, if they are old enough: a job writes its data before its record. What does not
carry a hash in its name was put there by somebody else, and stays.

A job that finds an old orphan which is just what it has made does not send it again, and names it. So the records that
have come or changed while the others were read are read as well, just before anything is deleted. What is left is a job
that found its data there before they were deleted and writes its record after that: then `verify` tells of a missing
object and how to have it made again. No job at work, no such race.

Whatever else lies in a store (checkpoints, pictures) is not looked at: it lies with its own records. Training states
are `training.leftovers`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.folders import is_key
from data_prep.sources.reading import column, in_order
from infra import layout
from infra.errors import NotFound, PixnerdError, RecordError
from infra.layout import place_of
from infra.records import DataObject, SnapshotRecord, named_sha256
from infra.store import Entry, Store

LARGEST = 64 << 20  # bytes of a JSON that is no record of ours and is looked into all the same
READERS = 16  # requests for small objects under way at once
SHOWN = 5  # keys
_QUOTED = re.compile(rb'"(%s[^"\\]+)"' % layout.DATA.encode())


class Count(NamedTuple):
    objects: int
    bytes: int


class Garbage(NamedTuple):
    objects: int  # under data/, in all
    orphans: dict[str, Count]  # "data/256" -> those to delete
    first: list[str]  # some of their keys
    young: int  # orphans that may be those of a job at work
    foreign: int  # objects whose names hold no hash
    unknown: list[str]  # keys of JSON that is no record of any kind that this pixnerd knows


def collect(store: Store, older_than_hours: float = 24.0, *, dry_run: bool = False) -> Garbage:
    """Find the orphans, and delete them unless it is a dry run. A record that cannot be read ends it before that."""
    limit = store.now() - 3600 * older_than_hours
    data: list[Entry] = []
    records: dict[str, float] = {}
    for entry in store.list_unchecked():  # whatever lies there: a name that is none of ours stops nothing
        if entry.key.startswith(layout.DATA):
            data.append(entry)
        elif _may_name(entry):
            records[entry.key] = entry.modified
    named = _named(store, records)
    ours = [entry for entry in data if named_sha256(entry.key) and is_key(entry.key)]
    unnamed = [entry for entry in ours if entry.key not in named]
    orphans = [entry for entry in unnamed if entry.modified <= limit]
    if orphans:
        since = [e.key for e in store.list_unchecked() if _may_name(e) and records.get(e.key) != e.modified]
        named = _named(store, since)
        orphans = [entry for entry in orphans if entry.key not in named]
    if not dry_run:
        for _ in in_order(store.delete, [entry.key for entry in orphans], READERS):
            pass
    return Garbage(
        objects=len(data),
        orphans=_counted(orphans),
        first=[entry.key for entry in orphans[:SHOWN]],
        young=sum(entry.modified > limit for entry in unnamed),
        foreign=len(data) - len(ours),
        unknown=[key for key in records if place_of(key) is None and not _is_of_a_folder(key)],
    )


def _counted(orphans: Iterable[Entry]) -> dict[str, Count]:
    found: dict[str, Count] = {}
    for entry in orphans:
        folder = "/".join(entry.key.split("/")[:2])
        objects, size = found.get(folder, (0, 0))
        found[folder] = Count(objects + 1, size + entry.size)
    return found


# What names objects


def _may_name(entry: Entry) -> bool:
    if entry.key.startswith((layout.DATA, *layout.NOT_OURS)) or not is_key(entry.key):
        return False
    place = place_of(entry.key)
    if place is None:
        return entry.key.endswith(".json") and entry.size <= LARGEST
    return place.record != "" or bool(place.names)


def _is_of_a_folder(key: str) -> bool:
    """Whether it lies with its own record: the settings of a checkpoint, say."""
    return named_sha256(key) is not None and any(folder.holds(key) for folder in layout.FOLDERS)


def _named(store: Store, keys: Collection[str]) -> set[str]:
    """The data that these records name."""
    return {name for names in in_order(partial(_names, store), keys, READERS) for name in names}


def _names(store: Store, key: str) -> set[str]:
    try:
        found = store.get(key)
    except NotFound:  # deleted since it was listed: old training states are
        return set()
    try:
        if layout.PLANNED.parse(key):
            table = pq.read_table(pa.BufferReader(found), columns=["table"])
            return set(filter(_is_data, table["table"].to_pylist()))
        if place_of(key) is None:  # somebody's, who may name ours: what they look like is not ours to say
            return {name.decode(errors="replace") for name in _QUOTED.findall(found)}
        names = set(filter(_is_data, _values(json.loads(found))))
        record = SnapshotRecord.model_validate_json(found) if layout.SNAPSHOT.parse(key) else None
    except (ValueError, RecursionError, pa.ArrowException, OSError) as error:
        raise _unreadable(store, key, type(error).__name__) from None
    for selection in (record.selection, record.held_out) if record else ():
        names |= _tars(store, key, selection)
    return names


def _tars(store: Store, key: str, selection: DataObject) -> set[str]:
    """Where a selection's images lie."""
    try:
        return {name for part in column(store, selection, "tar") for name in part.unique().to_pylist()}
    except (PixnerdError, KeyError, ValueError) as error:
        raise _unreadable(store, key, f"its {selection.key}: {type(error).__name__}") from None


def _values(found: Any) -> Iterator[Any]:
    """Every string of a JSON value, however deep."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        else:
            yield value


def _is_data(value: object) -> bool:
    return isinstance(value, str) and value.startswith(layout.DATA)


def _unreadable(store: Store, key: str, why: str) -> RecordError:
    return RecordError(
        f"{store.url}/{key} cannot be read ({why}), and may be all that names some of the data; nothing was deleted",
        remedy="if it is no longer needed delete it, or mend it; then collect again",
    )

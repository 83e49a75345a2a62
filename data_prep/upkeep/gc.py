"""`gc`: delete data objects that no record names. Killed jobs leave such orphans, and jobs whose record came second.

An object under `data/` is in use if its key is in any JSON record outside of `data/`, of whatever kind; in the table of
a plan, which names its inputs that were stored as Parquet; or in the selection of a snapshot, which names the tars of
its images. Every other object is an orphan if it is old enough: a job writes its data before its record, so a new one
may be about to be named. Objects without a hash in their names were not written by pixnerd, and stay.

A running job may make the very bytes of an old orphan. It then does not upload them, as the object exists, and writes a
record that names the orphan. So before anything is deleted, the records are listed once more, and new and changed ones
are read. One race is left: a job that found the object before it was deleted, and writes its record afterwards.
`verify` then reports a missing object, and how to have it made again. Without running jobs there is no such race.

Only `data/` is collected. What lies beside its own record (checkpoints, pictures) stays; `training.leftovers` deletes
old training states.
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
from data_prep.sources.reading import in_order, tars_in
from infra import layout
from infra.errors import NotFound, PixnerdError, RecordError
from infra.layout import place_of
from infra.records import DataObject, SnapshotRecord, named_sha256
from infra.store import Entry, Store

LARGEST = 64 << 20  # bytes: JSON files that are no records of pixnerd are searched for keys up to this size
READERS = 16  # simultaneous requests for small objects
SHOWN = 5  # keys of orphans that are listed by name
_QUOTED = re.compile(rb'"(%s[^"\\]+)"' % layout.DATA.encode())


class Count(NamedTuple):
    objects: int
    bytes: int


class Garbage(NamedTuple):
    objects: int  # under data/, in all
    orphans: dict[str, Count]  # folder, such as "data/256" -> the orphans in it that are old enough
    first: list[str]  # the first keys of these
    young: int  # orphans that are not old enough: a running job may be about to name them
    foreign: int  # objects without a hash in their names
    unknown: list[str]  # keys of JSON files that are no record of a kind that this pixnerd knows


def collect(store: Store, older_than_hours: float = 24.0, *, dry_run: bool = False) -> Garbage:
    """Find the orphans, and delete them unless `dry_run`. If a record cannot be read, nothing is deleted."""
    limit = store.now() - 3600 * older_than_hours
    data: list[Entry] = []
    records: dict[str, float] = {}
    for entry in store.list_unchecked():  # also names that pixnerd would not write
        if entry.key.startswith(layout.DATA):
            data.append(entry)
        elif _may_name(entry):
            records[entry.key] = entry.modified
    named = _named(store, records)
    ours = [entry for entry in data if named_sha256(entry.key) and is_key(entry.key)]
    unnamed = [entry for entry in ours if entry.key not in named]
    orphans = [entry for entry in unnamed if entry.modified <= limit]
    if orphans:
        newer = [e.key for e in store.list_unchecked() if _may_name(e) and records.get(e.key) != e.modified]
        named = _named(store, newer)
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
        unknown=[key for key in records if place_of(key) is None and not _is_in_a_folder(key)],
    )


def _counted(orphans: Iterable[Entry]) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    for entry in orphans:
        folder = "/".join(entry.key.split("/")[:2])
        objects, size = counts.get(folder, (0, 0))
        counts[folder] = Count(objects + 1, size + entry.size)
    return counts


# Which objects are named by records


def _may_name(entry: Entry) -> bool:
    """Whether an object is to be searched for keys of data objects."""
    if entry.key.startswith((layout.DATA, *layout.NOT_OURS)) or not is_key(entry.key):
        return False
    place = place_of(entry.key)
    if place is None:
        return entry.key.endswith(".json") and entry.size <= LARGEST
    return place.record != "" or bool(place.names)


def _is_in_a_folder(key: str) -> bool:
    """Whether it is a data object that lies beside its own record, such as the settings of a checkpoint."""
    return named_sha256(key) is not None and any(folder.holds(key) for folder in layout.FOLDERS)


def _named(store: Store, keys: Collection[str]) -> set[str]:
    """The keys of the data objects that these records name."""
    return {name for names in in_order(partial(_names, store), keys, READERS) for name in names}


def _names(store: Store, key: str) -> set[str]:
    try:
        content = store.get(key)
    except NotFound:  # deleted since it was listed, as old training states are
        return set()
    try:
        if layout.PLANNED.parse(key):
            table = pq.read_table(pa.BufferReader(content), columns=["table"])
            return set(filter(_is_data, table["table"].to_pylist()))
        if place_of(key) is None:  # not written by pixnerd: any quoted key counts, in whatever format
            return {name.decode(errors="replace") for name in _QUOTED.findall(content)}
        names = set(filter(_is_data, _strings(json.loads(content))))
        record = SnapshotRecord.model_validate_json(content) if layout.SNAPSHOT.parse(key) else None
    except (ValueError, RecursionError, pa.ArrowException, OSError) as error:
        raise _unreadable(store, key, type(error).__name__) from None
    for selection in (record.selection, record.held_out) if record else ():
        names |= _tars(store, key, selection)
    return names


def _tars(store: Store, key: str, selection: DataObject) -> set[str]:
    """The tars that hold a selection's images."""
    try:
        return set(tars_in(store, selection))
    except (PixnerdError, KeyError, ValueError) as error:
        raise _unreadable(store, key, f"its {selection.key}: {type(error).__name__}") from None


def _strings(json_value: Any) -> Iterator[Any]:
    """Every key and every plain value in a JSON value, however deep."""
    waiting = [json_value]
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

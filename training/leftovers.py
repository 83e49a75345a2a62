"""Training states that nobody will go on from: those of runs that are done, and parts that no state names.

A run deletes its own as it goes. What is found here was left by runs that were killed: between the last record and the
states before it, or between a state's parts and its record. Keys are all that is looked at, so whatever wrote the
states, and however damaged they are, they are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from infra import layout
from infra.errors import NotFound
from infra.store import Entry, Store

_HOME = re.compile(rf"{layout.TRAINING.under()}[^/]+")


class States(NamedTuple):
    objects: int
    bytes: int


def collect_states(store: Store, older_than_hours: float = 24.0, *, dry_run: bool = False) -> States:
    """Delete them, unless it is a dry run.

    A part is written before the state that names it: only those that are old are taken for left. Where a state's record
    cannot be read nothing of its run is, for that record may name it.
    """
    runs: dict[str, list[Entry]] = {}
    for entry in store.list_unchecked(layout.TRAINING.under()):
        if home := _HOME.match(entry.key):
            runs.setdefault(home[0], []).append(entry)
    limit = store.now() - 3600 * older_than_hours
    left = [entry for home, entries in runs.items() for entry in _left(store, home, entries, limit)]
    for entry in () if dry_run else left:
        store.delete(entry.key)
    return States(len(left), sum(entry.size for entry in left))


def _left(store: Store, home: str, entries: list[Entry], limit: float) -> Iterator[Entry]:
    """In the order in which they are to go: a state whose record is there must be whole."""
    records = [entry for entry in entries if entry.key.startswith(layout.STATE.under(home=home))]
    parts = [entry for entry in entries if layout.STATE_PARTS.holds(entry.key)]
    if any(entry.key == layout.CHECKPOINT.at(home=home) for entry in entries):
        yield from records
        yield from parts
        return
    old = [part for part in parts if part.modified <= limit]
    named = _named(store, [record.key for record in records], layout.STATE_PARTS.at(home=home)) if old else None
    if named is not None:
        yield from (part for part in old if part.key not in named)


def _named(store: Store, records: list[str], prefix: str) -> set[str] | None:
    """The parts that the records name; None if one cannot be read."""
    named: set[str] = set()
    for key in records:
        try:
            waiting = [json.loads(store.get(key))]
        except NotFound:  # dropped since it was listed, and its parts with it
            continue
        except (ValueError, RecursionError):
            return None
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str) and value.startswith(prefix):
                named.add(value)
    return named

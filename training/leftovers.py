"""Deletes training states that no run will resume from: those of finished runs, and parts that no state names.

A run deletes its own old states. These were left by runs that were killed after they published and before they deleted
their states, or between a state's parts and its record. States are recognised by their keys, whichever version wrote
them and however damaged they are; records only say which states are kept for good, and which parts are in use. Parts of
averages that no record names go in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from infra import layout
from infra.errors import NotFound
from infra.store import Entry, Store

_HOME = re.compile(rf"{layout.TRAINING.under()}[^/]+")


class States(NamedTuple):
    objects: int
    bytes: int


def collect_states(store: Store, older_than_hours: float = 24.0, *, dry_run: bool = False) -> States:
    """Delete unused training states, or only count them in a dry run.

    A part is written before the state that names it, so only old parts are deleted. Where a state's record cannot be
    read, no part of its run is, because that record may name it.
    """
    runs: dict[str, list[Entry]] = {}
    for entry in store.list_unchecked(layout.TRAINING.under()):
        if home := _HOME.match(entry.key):
            runs.setdefault(home[0], []).append(entry)
    limit = store.now() - 3600 * older_than_hours
    unused = [entry for home, entries in runs.items() for entry in _unused(store, home, entries, limit)]
    for entry in () if dry_run else unused:
        store.delete(entry.key)
    return States(len(unused), sum(entry.size for entry in unused))


def _unused(store: Store, home: str, entries: list[Entry], limit: float) -> Iterator[Entry]:
    """Records before parts: a state whose record exists must be complete, so that is the order of deletion."""
    records = [entry for entry in entries if entry.key.startswith(layout.STATE.under(home=home))]
    parts = [entry for entry in entries if layout.STATE_PARTS.holds(entry.key)]
    if any(entry.key == layout.CHECKPOINT.at(home=home) for entry in entries):
        stay = _kept(store, records)
        yield from (entry for entry in (*records, *parts) if entry.key not in stay)
    else:
        yield from _unnamed(store, records, parts, layout.STATE_PARTS.at(home=home), limit)
    averages = [entry for entry in entries if entry.key.startswith(layout.AVERAGES.under(home=home))]
    shares = [entry for entry in entries if layout.AVERAGES_PARTS.holds(entry.key)]
    yield from _unnamed(store, averages, shares, layout.AVERAGES_PARTS.at(home=home), limit)


def _unnamed(store: Store, records: list[Entry], parts: list[Entry], prefix: str, limit: float) -> Iterator[Entry]:
    """Old parts that none of the records names."""
    old = [part for part in parts if part.modified <= limit]
    named = _named(store, [record.key for record in records], prefix) if old else None
    if named is not None:
        yield from (part for part in old if part.key not in named)


def _kept(store: Store, records: list[Entry]) -> set[str]:
    """States that their run keeps for good, and their parts. (Read as JSON: their class would import PyTorch.)"""
    keys: set[str] = set()
    for record in records:
        with suppress(NotFound, ValueError, KeyError, TypeError, RecursionError):
            state = json.loads(store.get(record.key))
            if state["kept"]:
                keys |= {record.key, *(file["data"]["key"] for file in state["files"])}
    return keys


def _named(store: Store, records: list[str], prefix: str) -> set[str] | None:
    """The keys of parts in any field of the records; None if a record cannot be read."""
    named: set[str] = set()
    for key in records:
        try:
            values = [json.loads(store.get(key))]
        except NotFound:  # deleted since the keys were listed, and its parts with it
            continue
        except (ValueError, RecursionError):
            return None
        while values:
            value = values.pop()
            if isinstance(value, dict | list):
                values += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str) and value.startswith(prefix):
                named.add(value)
    return named

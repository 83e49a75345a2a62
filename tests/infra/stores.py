"""Whether what lies in a store lies where the page of keys says, and names what that page says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from infra import layout
from infra.layout import FOLDERS, place_of
from infra.records import named_sha256
from infra.store import Store


def misplaced(store: Store) -> list[str]:
    found = []
    for entry in store.list():
        key = entry.key
        # A workflow whose folder is its store keeps its page, its pictures and its database there, too.
        if "/" not in key or key.startswith(layout.NOT_OURS) or key.endswith(layout.BEAT):
            continue
        if named_sha256(key):
            found += [] if any(folder.holds(key) for folder in FOLDERS) else [f"{key} is in no folder"]
        elif (place := place_of(key)) is None:
            found.append(f"{key} is in no place")
        elif place.record:
            for data in _data_objects(json.loads(store.get(key))):
                if not any(folder.holds(data) for folder in place.names):
                    found.append(f"{key} may not name {data}")
    return found


def _data_objects(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if value.keys() == {"key", "sha256", "size"}:
            yield value["key"]
        for inner in value.values():
            yield from _data_objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _data_objects(inner)

"""What became of the shape world's files, kind by kind. Of no other corpus is it known what is odd about each file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.shapes.corpus import kind_of
from infra.records import SnapshotRecord
from infra.shards import list_shards, read_index, read_selection
from infra.store import Store

ABOUT = {
    "plain": "ordinary JPEG and PNG files",
    "rgb16": "PNG with 16 bits a channel",
    "grey16": "grey PNG with 16 bits",
    "cmyk": "JPEG in printing colours",
    "rotated": "JPEG turned by its EXIF tag",
    "palette": "indexed PNG, transparent background",
    "duplicate": "a copy of another file",
    "truncated": "a file that ends too early",
    "bomb": "a header that declares 30,000 x 30,000 pixels",
    "tiny": "smaller than the smallest size",
    "not_an_image": "a web page called .jpg",
}


@dataclass
class Fate:
    kind: str
    files: int = 0
    accepted: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)  # number of a snapshot -> its samples, held out or not
    example: bytes | None = None  # a JPEG, as training sees it


def fates(store: Store, shards: str, seed: int, snapshots: Sequence[SnapshotRecord]) -> list[Fate]:
    """The fates of all files in the shards under the prefix `shards`, in the order of ABOUT."""
    keys = [_keys(store, snapshot) for snapshot in snapshots]
    by_kind = {kind: Fate(kind) for kind in ABOUT}
    for shard in list_shards(store, shards):
        table = read_index(store, shard, ["key", "name", "accepted", "cause", "offset", "length"])
        for row in table.to_pylist():
            stem = Path(row["name"]).stem
            kind = kind_of(int(stem), seed) if stem.isdecimal() else "other"
            fate = by_kind.setdefault(kind, Fate(kind))
            fate.files += 1
            if not row["accepted"]:
                fate.causes[row["cause"]] += 1
                continue
            fate.accepted += 1
            fate.kept.update(number for number, members in enumerate(keys) if row["key"] in members)
            if fate.example is None and shard.tar is not None:
                fate.example = store.get(shard.tar.key, row["offset"], row["offset"] + row["length"])
    return [fate for fate in by_kind.values() if fate.files]


def _keys(store: Store, snapshot: SnapshotRecord) -> frozenset[str]:
    tables = [read_selection(store, snapshot, held_out=held_out, columns=["key"]) for held_out in (False, True)]
    return frozenset(key for table in tables for key in table["key"].to_pylist())

"""Forgetting: lists of items that no later snapshot of any plan contains, and a report of who has used them already.

    forgotten/<digest>.json                    ForgottenRecord: one list, and the reason for it
    data/forgotten/<digest>-<sha256>.parquet   its keys, and the hashes of their pixels at every size

Lists add up; none is ever changed or withdrawn. A twin, an image with exactly the pixels of a forgotten one, is
forgotten too; otherwise it would become the survivor of the group of duplicates. Shards, earlier snapshots and
checkpoints stay in the store as they are; `forget` reports the snapshots, exports and checkpoints that have the items.

A key is made of the names of the source and of the item, so an item stays forgotten when its corpus is prepared anew.
An item that no plan in the store holds yet is unknown: prepare it first, then forget it.

An item can be named by its origin only if that is a URL of its own: each item of a list of URLs has one, and items of
other sources do if the settings say which column or field holds it. The `origin` of a whole corpus names no item.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare.plan import Edition, Plan
from data_prep.sources.reading import column, in_order
from infra import layout
from infra.config import digest
from infra.errors import DataError, SettingsError
from infra.records import (
    AveragesRecord,
    CheckpointRecord,
    DataObject,
    ExportRecord,
    Plain,
    Record,
    ShardRecord,
    SnapshotRecord,
    put_data,
    read_record,
    write_record,
)
from infra.shards import list_shards, parquet_bytes, read_index, read_parquet, shard_prefix
from infra.store import Store

NAMES = ("key", "name")  # the columns of an index by which an item may be named, besides its hashes and its origin
HASHES = ("image_sha256", "pixels_sha256")
OWN_ORIGIN = ("origin_column", "origin_field")  # settings of a source that give each of its items an origin
LIST_COLUMNS = ("key", "image_sha256", "pixels_sha256", "sha256", "origin", "url", "name")  # of a list in Parquet
ITEMS = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("pixels_sha256", pa.binary(32))])

Mask = npt.NDArray[np.bool_]
Hit = tuple[str, bytes | None]  # the key of a row, and the hash of its pixels, None if it was rejected


class Searched(Plain):
    """Which shards under a prefix hold items of a list, of those that existed when the list was written."""

    shards: int  # every shard with a smaller number was searched
    rows: int  # the number of keys to be forgotten in these shards
    found: list[int] | None = None  # the shards that hold them; None in a list of an older version

    def clears(self, numbers: Collection[int]) -> bool:
        """Whether all of these shards were searched, and none of them holds an item of the list."""
        if self.found is None or max(numbers, default=-1) >= self.shards:
            return False
        return not set(self.found).intersection(numbers)


class ForgottenRecord(Record):
    reason: str
    twins: bool  # whether images with the same pixels are forgotten as well
    items: DataObject  # Parquet, see ITEMS
    keys: int
    searched: dict[str, Searched]  # prefix of shard records -> the result of the search there


class AffectedSnapshot(NamedTuple):
    """An earlier snapshot that contains some of the items."""

    snapshot: str  # key of its record
    digest: str
    training: int  # how many of the keys
    held_out: int


class AffectedCheckpoint(NamedTuple):
    """A checkpoint of a model that has used some of the items, or the averages that were kept of it."""

    checkpoint: str  # key of its record
    digest: str
    step: int
    how: str  # "trained" on them; "inherited" from a checkpoint that was; "held_out" from training on its snapshot
    snapshot: str  # digest of the snapshot that it was itself trained on


class AffectedExport(NamedTuple):
    """An export of an affected snapshot. It still exists unless somebody has removed it."""

    to: str
    layout: str
    snapshot: str  # key of its record


class Forgotten(NamedTuple):
    """The report of `forget`."""

    record: str | None  # key of the ForgottenRecord, None for a dry run
    keys: int  # samples that the items name, in all plans
    twins: int  # further samples with the same pixels
    unknown: list[str]  # items that no plan in this store holds
    snapshots: list[AffectedSnapshot]
    exports: list[AffectedExport]
    checkpoints: list[AffectedCheckpoint]


def read_list(path: Path) -> list[str]:
    """The items that a file names, as `forget` takes them.

    A text file (UTF-8) has an item on each line, and blank lines are skipped. Of a Parquet file, the first of
    LIST_COLUMNS that it has is read, or its only column.
    """
    try:
        if path.suffix == ".parquet":
            return _column(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise SettingsError(f"there is no file {path}", remedy="name a text file or a Parquet file") from None
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise SettingsError(
            f"the list {path} cannot be read ({type(error).__name__})", remedy="name a text file or a Parquet file"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _column(path: Path) -> list[str]:
    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    names = [name for name in LIST_COLUMNS if name in columns] or (columns if len(columns) == 1 else [])
    if not names:
        raise SettingsError(
            f"{path} has none of the columns that name items", remedy=f"call one of them {', '.join(LIST_COLUMNS)}"
        )
    values = file.read(columns=names[:1])[names[0]].drop_null().to_pylist()
    return [value.hex() if isinstance(value, bytes) else str(value) for value in values]


def forget(store: Store, items: Sequence[str], reason: str, *, twins: bool = True, dry_run: bool = False) -> Forgotten:
    """Forget items by key, by their name in the corpus, by URL, or by the sha256 of their image or pixels in hex.

    The list is written before snapshots are searched, so one made meanwhile either leaves the items out or is reported.
    """
    if not items:
        raise SettingsError("the list names no items", remedy="write one a line: keys, names, URLs, or sha256 in hex")
    wanted = _Wanted(items)
    prefixes = sorted({key.rpartition("/")[0] + "/" for key in layout.SHARD.keys(store)})  # of every plan and size
    shards = {prefix: list(list_shards(store, prefix)) for prefix in prefixes}
    hits = {prefix: _search(store, prefix, records, wanted) for prefix, records in shards.items()}
    if not any(hits.values()):
        raise DataError(
            f"none of the {len(items)} items is in this store (the first is {items[0]!a:.200})",
            remedy="write them as keys, as names or URLs of the corpus, or as sha256 in hex; prepare the corpus first",
        )
    all_hits = {hit for by_shard in hits.values() for shard_hits in by_shard.values() for hit in shard_hits}
    keys = {key for key, _ in all_hits}
    hashes = {pixels for _, pixels in all_hits if pixels} if twins else set()
    twin_keys = {prefix: _twins(store, records, hashes) if twins else {} for prefix, records in shards.items()}
    searched = {prefix: _searched(records, hits[prefix], twin_keys[prefix]) for prefix, records in shards.items()}
    record = None if dry_run else _write(store, all_hits, reason, twins, searched)
    with_twins = {prefix: keys.union(*by_shard.values()) for prefix, by_shard in twin_keys.items()}
    snapshots = list(_affected_snapshots(store, with_twins, keys))
    return Forgotten(
        record=record,
        keys=len(keys),
        twins=len(set().union(*with_twins.values()) - keys),
        unknown=wanted.unknown(),
        snapshots=snapshots,
        exports=_affected_exports(store, {affected.snapshot for affected in snapshots}),
        checkpoints=_affected_checkpoints(store, snapshots),
    )


def _searched(shards: Sequence[ShardRecord], hits: dict[int, set[Hit]], twins: dict[int, set[str]]) -> Searched:
    # Rejected rows count: with a repaired file or another decoder they may be accepted when the shard is made again.
    keys = {number: {key for key, _ in shard_hits} for number, shard_hits in hits.items()}
    for number, twin_keys in twins.items():
        keys.setdefault(number, set()).update(twin_keys)
    numbers = {shard.number for shard in shards}
    return Searched(
        shards=next(number for number in range(len(numbers) + 1) if number not in numbers),
        rows=len(set().union(*keys.values())),
        found=sorted(number for number, shard_keys in keys.items() if shard_keys),
    )


def _write(store: Store, hits: set[Hit], reason: str, twins: bool, searched: dict[str, Searched]) -> str:
    ordered = sorted(hits, key=lambda hit: (hit[0], hit[1] or b""))
    rows = pa.Table.from_pylist([dict(zip(ITEMS.names, hit, strict=True)) for hit in ordered], schema=ITEMS)
    items = [[key, pixels and pixels.hex()] for key, pixels in ordered]
    name = digest({"reason": reason, "twins": twins, "items": items})
    record = ForgottenRecord(
        reason=reason,
        twins=twins,
        items=put_data(store, layout.FORGOTTEN_ITEMS.at(), f"{name}.parquet", parquet_bytes(rows)),
        keys=len({key for key, _ in hits}),
        searched=searched,
    )
    key = layout.FORGOTTEN.at(items=name)
    write_record(store, key, record)
    return key


# ------------------------------------------------------------------------------------------------ finding items


class _Wanted:
    """The items of a list by the kinds of names that they may be, and which of them some index has."""

    def __init__(self, items: Sequence[str]) -> None:
        self.items = list(dict.fromkeys(items))
        self.names = frozenset(items)
        self.urls = frozenset(item for item in items if "://" in item)
        self.hashes = frozenset(bytes.fromhex(item) for item in items if _is_sha256(item))
        self._known: set[str | bytes] = set()

    def mask(self, table: pa.Table, shared: dict[str, str]) -> Mask:
        """The rows that items name; the items are marked as known. For `shared`, see _shared_origins."""
        masks = {name: members(table[name], self.names) for name in NAMES}
        masks |= {name: members(table[name], self.hashes) for name in HASHES}
        masks["origin"] = self._by_origin(table, shared)
        for name, mask in masks.items():
            self._known.update(table[name].filter(pa.array(mask)).to_pylist())
        union: Mask = np.logical_or.reduce(list(masks.values()))
        return union

    def _by_origin(self, table: pa.Table, shared: dict[str, str]) -> Mask:
        mask = members(table["origin"], self.urls)
        rows = table.select(["source", "origin"]).filter(pa.array(mask)).to_pylist()
        mask[mask] = [shared.get(row["source"], row["origin"]) != row["origin"] for row in rows]
        return mask

    def unknown(self) -> list[str]:
        return [item for item in self.items if not self._known & {item, _is_sha256(item) and bytes.fromhex(item)}]


def _is_sha256(item: str) -> bool:
    return len(item) == 64 and all(letter in "0123456789abcdefABCDEF" for letter in item)


def members(column: pa.ChunkedArray, values: Collection[str | bytes]) -> Mask:
    return np.fromiter((value in values for value in column.to_numpy(zero_copy_only=False)), bool, len(column))


def _search(store: Store, prefix: str, shards: Sequence[ShardRecord], wanted: _Wanted) -> dict[int, set[Hit]]:
    """The rows that items name, by shard. A key may have several hashes, if the file of its item has changed."""
    shared = _shared_origins(store, layout.SHARDS.parts(prefix)["plan"])
    hits: dict[int, set[Hit]] = {}
    for number, table in _tables(store, shards, [*NAMES, *HASHES, "origin", "source"]):
        rows = table.filter(pa.array(wanted.mask(table, shared)))
        if rows.num_rows:
            hits[number] = set(zip(rows["key"].to_pylist(), rows["pixels_sha256"].to_pylist(), strict=True))
    return hits


def _shared_origins(store: Store, plan: str) -> dict[str, str]:
    """For each source whose items have origins of their own, that of the corpus, which items without one have."""
    for key in layout.EDITION.keys(store, plan=plan):
        sources = read_record(store, key, Edition).settings.get("sources", [])  # the same in all editions
        return {
            source["name"]: source.get("origin", "")
            for source in sources
            if source["kind"] == "url_list" or any(source.get(name) for name in OWN_ORIGIN)
        }
    return {}


def _twins(store: Store, shards: Sequence[ShardRecord], hashes: Collection[bytes]) -> dict[int, set[str]]:
    """The keys of all rows whose pixels have one of these hashes, by shard."""
    tables = _tables(store, shards, ["key", "pixels_sha256"])
    keys = {number: table["key"].filter(pa.array(members(table["pixels_sha256"], hashes))) for number, table in tables}
    return {number: set(column.to_pylist()) for number, column in keys.items() if len(column)}


def _tables(store: Store, shards: Sequence[ShardRecord], columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    return in_order(lambda shard: (shard.number, read_index(store, shard, columns)), shards)


# ------------------------------------------------------------------------------------------------ who has used them


def _affected_snapshots(store: Store, forgotten: dict[str, set[str]], keys: set[str]) -> Iterator[AffectedSnapshot]:
    """`forgotten`: the keys and those of their twins, by prefix; `keys` for a prefix that was not searched."""
    for key in layout.SNAPSHOT.keys(store):
        record = read_record(store, key, SnapshotRecord)
        its_keys = forgotten.get(record.shards, keys)
        training, held_out = (count_listed(store, half, its_keys) for half in (record.selection, record.held_out))
        if training or held_out:
            yield AffectedSnapshot(key, record.digest(), training, held_out)


def count_listed(store: Store, selection: DataObject, keys: set[str]) -> int:
    """How many of the keys a selection lists."""
    return len({key for chunk in column(store, selection, "key") for key in keys.intersection(chunk.to_pylist())})


def _affected_exports(store: Store, snapshots: Collection[str]) -> list[AffectedExport]:
    records = (read_record(store, key, ExportRecord) for key in layout.EXPORT.keys(store))
    return [AffectedExport(r.to, r.layout, r.snapshot) for r in records if r.snapshot in snapshots]


def _affected_checkpoints(store: Store, snapshots: Sequence[AffectedSnapshot]) -> list[AffectedCheckpoint]:
    training = {affected.digest for affected in snapshots if affected.training}
    held_out = {affected.digest for affected in snapshots if affected.held_out}
    kinds: dict[layout.Place, type[CheckpointRecord | AveragesRecord]] = {
        layout.CHECKPOINT: CheckpointRecord,
        layout.CHECKPOINT_AT: CheckpointRecord,
        layout.AVERAGES: AveragesRecord,
    }
    records = {
        entry.key: read_record(store, entry.key, kind)
        for home in (layout.TRAINING, layout.IMPORTED)
        for entry in store.list(home.under())
        for place, kind in kinds.items()
        if place.parse(entry.key)
    }
    by_digest = {record.digest(): record for record in records.values()}

    def how(record: CheckpointRecord | AveragesRecord | None) -> str | None:
        own = "held_out" if record and record.snapshot in held_out else None
        first = record
        while record is not None:
            if record.snapshot in training:
                return "trained" if record is first else "inherited"
            record = by_digest.get(record.start_from or "")
        return own

    return [
        AffectedCheckpoint(key, record.digest(), record.step, used, record.snapshot)
        for key, record in records.items()
        if (used := how(record))
    ]


# ------------------------------------------------------------------------------------------------ for snapshots


def concerning(store: Store, plan: Plan, size: str) -> dict[str, ForgottenRecord]:
    """The lists that may concern the shards of a plan's edition."""
    return lists_about(store, shard_prefix(plan.digest, size), plan.all_numbers(size))


def lists_about(store: Store, prefix: str, numbers: Collection[int]) -> dict[str, ForgottenRecord]:
    """The lists that may concern some of the shards under a prefix: all except those that are known not to."""
    records = {Path(key).stem: read_record(store, key, ForgottenRecord) for key in layout.FORGOTTEN.keys(store)}
    searched = {name: record.searched.get(prefix) for name, record in records.items()}
    return {name: records[name] for name, result in searched.items() if result is None or not result.clears(numbers)}


class ForgottenItems:
    """The items of some lists, and with `learn` their twins, as masks over the rows of an index."""

    def __init__(self, store: Store, lists: Mapping[str, ForgottenRecord]) -> None:
        self.lists = list(lists)
        self.keys: set[str] = set()
        self._with_twins: set[str] = set()
        self._hashes: set[bytes] = set()
        for record in lists.values():
            table = read_parquet(store, record.items, None)
            keys = set(table["key"].to_pylist())
            self.keys |= keys
            if record.twins:
                self._with_twins |= keys
                self._hashes |= set(table["pixels_sha256"].drop_null().to_pylist())

    def __bool__(self) -> bool:
        return bool(self.lists)

    def learn(self, table: pa.Table) -> None:
        """Note the pixels of forgotten rows: shards made since the list may hold the items with other pixels."""
        if self._with_twins:
            rows = table.filter(pa.array(members(table["key"], self._with_twins)))
            self._hashes |= set(rows["pixels_sha256"].drop_null().to_pylist())

    def mask(self, table: pa.Table) -> Mask:
        """The rows to be left out."""
        return members(table["key"], self.keys) | members(table["pixels_sha256"], self._hashes)

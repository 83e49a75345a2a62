"""Items taken out of every later snapshot, of whatever plan, and who has seen them already.

    forgotten/<digest>.json                    ForgottenRecord: one list and why
    data/forgotten/<digest>-<sha256>.parquet   its keys, and the hashes of their pixels at every size

Lists add up; none is ever changed or taken back. An image that has the very pixels of a forgotten one goes with it, so
that it does not slip in as the next survivor of its duplicates. Shards are left as they are: what they hold is still
in the store, and so are earlier snapshots and checkpoints, which `forget` names.

A key is made of a source's name and the item's own, so an item stays forgotten when its corpus is prepared anew. One
that no plan in the store holds yet is unknown: prepare it, then forget it.

An origin names an item only where it is a URL and the item's own: a list of URLs gives each of its items one, other
sources if they say which column or field holds it. The `origin` of a whole corpus names none of its items.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from data_prep.prepare.plan import Edition, Plan
from data_prep.sources.reading import column, in_order
from infra import layout
from infra.config import digest
from infra.errors import DataError, SettingsError
from infra.records import (
    CheckpointRecord,
    DataObject,
    ExportRecord,
    Record,
    ShardRecord,
    SnapshotRecord,
    get_data,
    put_data,
    read_record,
    write_record,
)
from infra.shards import list_shards, parquet_bytes, read_index, shard_prefix
from infra.store import Store

NAMES = ("key", "name")  # what an item may be called by, besides an origin of its own
HASHES = ("image_sha256", "pixels_sha256")
OWN_ORIGIN = ("origin_column", "origin_field")  # the settings of a source that say where its items' origins stand
LIST_COLUMNS = ("key", "image_sha256", "pixels_sha256", "sha256", "origin", "url", "name")  # of a list in Parquet
ITEMS = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("pixels_sha256", pa.binary(32))])

Mask = npt.NDArray[np.bool_]
Hit = tuple[str, bytes | None]  # the key of a row, and the hash of its pixels; none where it was rejected


class Searched(BaseModel):
    """What a list has to do with the shards under a prefix, as far as they were there when it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shards: int  # every shard with a smaller number was looked through
    rows: int  # to be forgotten there
    found: list[int] | None = None  # the shards that hold those; none: an older list, which does not say

    def clears(self, numbers: Collection[int]) -> bool:
        """Whether all of these shards were looked through, and none of them holds any."""
        if self.found is None or max(numbers, default=-1) >= self.shards:
            return False
        return not set(self.found).intersection(numbers)


class ForgottenRecord(Record):
    reason: str
    twins: bool  # whether images of the same pixels go as well
    items: DataObject  # Parquet, see ITEMS
    keys: int
    searched: dict[str, Searched]  # prefix of shard records -> what was found


class Holder(NamedTuple):
    """A snapshot that was made before, with the items in it."""

    snapshot: str  # key of its record
    digest: str
    training: int
    held_out: int


class Witness(NamedTuple):
    """A checkpoint that has to do with the items."""

    checkpoint: str  # key of its record
    digest: str
    step: int
    how: str  # "trained": they were in its data; "inherited": so in a checkpoint that it began from; "held_out"
    snapshot: str  # digest of the data it was itself trained on


class Copy(NamedTuple):
    """What was exported of such a snapshot, and still lies there unless somebody has removed it."""

    to: str
    layout: str
    snapshot: str  # key of its record


class Forgotten(NamedTuple):
    record: str | None  # its key; none where nothing was written
    keys: int  # samples asked for, in all plans
    twins: int  # further samples that have their pixels
    unknown: list[str]  # items that no plan in this store holds
    snapshots: list[Holder]
    exports: list[Copy]
    checkpoints: list[Witness]


def read_list(path: Path) -> list[str]:
    """The items of a list, each called as `forget` takes it.

    A text file (UTF-8) has a line for each; blank lines are passed over. Of a Parquet file it is the first of
    LIST_COLUMNS that it has, or the only column.
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
    there = file.schema_arrow.names
    names = [name for name in LIST_COLUMNS if name in there] or (there if len(there) == 1 else [])
    if not names:
        raise SettingsError(
            f"{path} has none of the columns that name items", remedy=f"call one of them {', '.join(LIST_COLUMNS)}"
        )
    values = file.read(columns=names[:1])[names[0]].drop_null().to_pylist()
    return [value.hex() if isinstance(value, bytes) else str(value) for value in values]


def forget(store: Store, items: Sequence[str], reason: str, *, twins: bool = True, dry_run: bool = False) -> Forgotten:
    """Forget items by key, by the corpus's name, by URL, or by the sha256 of their image or pixels in hex.

    The list is written before it is asked who holds its items: a snapshot that is made meanwhile heeds it or is named.
    """
    if not items:
        raise SettingsError("the list names no items", remedy="write one a line: keys, names, URLs, or sha256 in hex")
    wanted = _Wanted(items)
    shards = {prefix: list(list_shards(store, prefix)) for prefix in _prefixes(store)}
    hits = {prefix: _search(store, prefix, found, wanted) for prefix, found in shards.items()}
    if not any(hits.values()):
        raise DataError(
            f"none of the {len(items)} items is in this store (the first is {items[0]!a:.200})",
            remedy="write them as keys, as names or URLs of the corpus, or as sha256 in hex; prepare the corpus first",
        )
    pairs = {pair for found in hits.values() for here in found.values() for pair in here}
    keys = {key for key, _ in pairs}
    hashes = {value for _, value in pairs if value} if twins else set()
    same = {prefix: _twins(store, found, hashes) if twins else {} for prefix, found in shards.items()}
    searched = {prefix: _searched(found, hits[prefix], same[prefix]) for prefix, found in shards.items()}
    record = None if dry_run else _write(store, pairs, reason, twins, searched)
    with_twins = {prefix: keys.union(*found.values()) for prefix, found in same.items()}
    snapshots = list(_holders(store, with_twins, keys))
    return Forgotten(
        record=record,
        keys=len(keys),
        twins=len(set().union(*with_twins.values()) - keys),
        unknown=wanted.unknown(),
        snapshots=snapshots,
        exports=_copies(store, {holder.snapshot for holder in snapshots}),
        checkpoints=_witnesses(store, snapshots),
    )


def _searched(shards: Sequence[ShardRecord], hits: dict[int, set[Hit]], same: dict[int, set[str]]) -> Searched:
    # Rejected ones as well: mended, or under another decoder, they may be accepted once the shard is made again.
    gone = {number: {key for key, _ in here} for number, here in hits.items()}
    for number, twins in same.items():
        gone.setdefault(number, set()).update(twins)
    return Searched(
        shards=_without_gap(shards),
        rows=len(set().union(*gone.values())),
        found=sorted(number for number, here in gone.items() if here),
    )


def _write(store: Store, hits: set[Hit], reason: str, twins: bool, searched: dict[str, Searched]) -> str:
    pairs = sorted(hits, key=lambda pair: (pair[0], pair[1] or b""))
    rows = pa.Table.from_pylist([dict(zip(ITEMS.names, pair, strict=True)) for pair in pairs], schema=ITEMS)
    name = digest({"reason": reason, "twins": twins, "items": [[key, value and value.hex()] for key, value in pairs]})
    record = ForgottenRecord(
        reason=reason,
        twins=twins,
        items=put_data(store, layout.FORGOTTEN_ITEMS.at(), f"{name}.parquet", parquet_bytes(rows)),
        keys=len({key for key, _ in pairs}),
        searched=searched,
    )
    key = layout.FORGOTTEN.at(items=name)
    write_record(store, key, record)
    return key


# ------------------------------------------------------------------------------------------------ finding them


class _Wanted:
    def __init__(self, items: Sequence[str]) -> None:
        self.items = list(dict.fromkeys(items))
        self.names = frozenset(items)
        self.urls = frozenset(item for item in items if "://" in item)
        self.hashes = frozenset(bytes.fromhex(item) for item in items if _is_sha256(item))
        self._known: set[str | bytes] = set()

    def mask(self, table: pa.Table, shared: dict[str, str]) -> Mask:
        """The rows that an item names, noting which items do. `shared`: see _shared_origins."""
        marks = {name: members(table[name], self.names) for name in NAMES}
        marks |= {name: members(table[name], self.hashes) for name in HASHES}
        marks["origin"] = self._by_origin(table, shared)
        for name, here in marks.items():
            self._known.update(table[name].filter(pa.array(here)).to_pylist())
        found: Mask = np.logical_or.reduce(list(marks.values()))
        return found

    def _by_origin(self, table: pa.Table, shared: dict[str, str]) -> Mask:
        here = members(table["origin"], self.urls)
        rows = table.select(["source", "origin"]).filter(pa.array(here)).to_pylist()
        here[here] = [shared.get(row["source"], row["origin"]) != row["origin"] for row in rows]
        return here

    def unknown(self) -> list[str]:
        return [item for item in self.items if not self._known & {item, _is_sha256(item) and bytes.fromhex(item)}]


def _is_sha256(item: str) -> bool:
    return len(item) == 64 and all(letter in "0123456789abcdefABCDEF" for letter in item)


def members(column: pa.ChunkedArray, among: Collection[str | bytes]) -> Mask:
    return np.fromiter((value in among for value in column.to_numpy(zero_copy_only=False)), bool, len(column))


def _prefixes(store: Store) -> list[str]:
    """Of the shard records of every plan and size."""
    return sorted({key.rpartition("/")[0] + "/" for key in layout.SHARD.keys(store)})


def _without_gap(shards: Sequence[ShardRecord]) -> int:
    numbers = {shard.number for shard in shards}
    return next(number for number in range(len(numbers) + 1) if number not in numbers)


def _search(store: Store, prefix: str, shards: Sequence[ShardRecord], wanted: _Wanted) -> dict[int, set[Hit]]:
    """The rows that items name, by shard. A key may have several pictures: one for each content that its input had."""
    shared = _shared_origins(store, layout.SHARDS.parts(prefix)["plan"])
    found: dict[int, set[Hit]] = {}
    for number, table in _tables(store, shards, [*NAMES, *HASHES, "origin", "source"]):
        rows = table.filter(pa.array(wanted.mask(table, shared)))
        if rows.num_rows:
            found[number] = set(zip(rows["key"].to_pylist(), rows["pixels_sha256"].to_pylist(), strict=True))
    return found


def _shared_origins(store: Store, plan: str) -> dict[str, str]:
    """The sources whose items have origins of their own, and the corpus's, which items without one share."""
    for key in layout.EDITION.keys(store, plan=plan):
        sources = read_record(store, key, Edition).settings.get("sources", [])  # the same in all editions
        return {
            source["name"]: source.get("origin", "")
            for source in sources
            if source["kind"] == "url_list" or any(source.get(name) for name in OWN_ORIGIN)
        }
    return {}


def _twins(store: Store, shards: Sequence[ShardRecord], hashes: Collection[bytes]) -> dict[int, set[str]]:
    """The keys of all rows that have one of these pixels, by shard."""
    found: dict[int, set[str]] = {}
    for number, table in _tables(store, shards, ["key", "pixels_sha256"]):
        keys = table["key"].filter(pa.array(members(table["pixels_sha256"], hashes))).to_pylist()
        if keys:
            found[number] = set(keys)
    return found


def _tables(store: Store, shards: Sequence[ShardRecord], columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    return in_order(lambda shard: (shard.number, read_index(store, shard, columns)), shards)


# ------------------------------------------------------------------------------------------------ who has seen them


def _holders(store: Store, gone: dict[str, set[str]], keys: set[str]) -> Iterator[Holder]:
    for key in layout.SNAPSHOT.keys(store):
        record = read_record(store, key, SnapshotRecord)
        here = gone.get(record.shards, keys)
        training, held_out = (_held(store, part, here) for part in (record.selection, record.held_out))
        if training or held_out:
            yield Holder(key, record.digest(), training, held_out)


def _held(store: Store, selection: DataObject, keys: set[str]) -> int:
    """How many of the keys it lists."""
    return len({key for part in column(store, selection, "key") for key in keys.intersection(part.to_pylist())})


def _copies(store: Store, snapshots: Collection[str]) -> list[Copy]:
    records = [read_record(store, key, ExportRecord) for key in layout.EXPORT.keys(store)]
    return [Copy(one.to, one.layout, one.snapshot) for one in records if one.snapshot in snapshots]


def _witnesses(store: Store, snapshots: Sequence[Holder]) -> list[Witness]:
    training = {holder.digest for holder in snapshots if holder.training}
    held_out = {holder.digest for holder in snapshots if holder.held_out}
    records = dict(_checkpoints(store))
    by_digest = {record.digest(): record for record in records.values()}

    def how(record: CheckpointRecord | None) -> str | None:
        own = "held_out" if record and record.snapshot in held_out else None
        first = record
        while record is not None:
            if record.snapshot in training:
                return "trained" if record is first else "inherited"
            record = by_digest.get(record.start_from or "")
        return own

    found = [(key, record, how(record)) for key, record in records.items()]
    return [Witness(key, record.digest(), record.step, how, record.snapshot) for key, record, how in found if how]


def _checkpoints(store: Store) -> Iterator[tuple[str, CheckpointRecord]]:
    for home in (layout.TRAINING, layout.IMPORTED):
        for entry in store.list(home.under()):
            if layout.CHECKPOINT.parse(entry.key):
                yield entry.key, read_record(store, entry.key, CheckpointRecord)


# ------------------------------------------------------------------------------------------------ what snapshots ask


def concerning(store: Store, plan: Plan, size: str) -> dict[str, ForgottenRecord]:
    """The lists that may concern the shards of a plan's edition."""
    return lists_about(store, shard_prefix(plan.digest, size), plan.all_numbers(size))


def lists_about(store: Store, prefix: str, numbers: Collection[int]) -> dict[str, ForgottenRecord]:
    """The lists that may concern some of the shards under a prefix: all but those that are known not to."""
    found = {Path(key).stem: read_record(store, key, ForgottenRecord) for key in layout.FORGOTTEN.keys(store)}
    searched = {name: record.searched.get(prefix) for name, record in found.items()}
    return {name: found[name] for name, before in searched.items() if before is None or not before.clears(numbers)}


class Gone:
    """All that these lists forget."""

    def __init__(self, store: Store, lists: Mapping[str, ForgottenRecord]) -> None:
        self.lists = list(lists)
        self.keys: set[str] = set()
        self._with_twins: set[str] = set()
        self._hashes: set[bytes] = set()
        for record in lists.values():
            table = pq.read_table(pa.BufferReader(get_data(store, record.items)))
            keys = set(table["key"].to_pylist())
            self.keys |= keys
            if record.twins:
                self._with_twins |= keys
                self._hashes |= set(table["pixels_sha256"].drop_null().to_pylist())

    def __bool__(self) -> bool:
        return bool(self.lists)

    def learn(self, table: pa.Table) -> None:
        """Note the pixels of forgotten rows: shards that were made since may hold them in another form."""
        if self._with_twins:
            rows = table.filter(pa.array(members(table["key"], self._with_twins)))
            self._hashes |= set(rows["pixels_sha256"].drop_null().to_pylist())

    def mask(self, table: pa.Table) -> Mask:
        return members(table["key"], self.keys) | members(table["pixels_sha256"], self._hashes)

"""Every shard of a plan's edition, read again and compared with its record: hashes, counts, order, members."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from data_prep.images.decode import decode
from data_prep.images.sizes import SUFFIX
from data_prep.prepare.plan import KnownAs, Plan, PlannedShard
from data_prep.rejections import Rejection
from data_prep.sources.reading import in_order
from data_prep.upkeep.verify.report import Report, examine, index_and_tar
from infra.errors import DataError, PixnerdError, RecordError, StoreUnreachable
from infra.files import sha256_of
from infra.records import DataObject, ShardRecord, read_record
from infra.shards import INDEX_SCHEMA, data_name, first_text, read_index, shard_key, shard_prefix
from infra.store import Store

Names = Callable[[dict[str, Any]], list[str]]


@dataclass
class _Reach:
    """How far the checked shards of an input have come in its rows."""

    rows: int = 0  # the number of the row that must follow
    known: bool = True  # False after a shard whose rows could not be read
    last: PlannedShard | None = None


class Shards(Report):
    """The shards of a plan at one size."""

    def __init__(self, store: Store, plan: Plan, size: str) -> None:
        super().__init__(store)
        self.again: dict[int, PlannedShard] = {}
        self.shards = self.inputs = self.images = 0
        self._store, self._plan, self._size = store, plan, size
        self._suffix = SUFFIX[plan.settings["format"]]
        self._with_text = plan.settings.get("text", False)  # older plans lack the setting, and their shards the texts
        self._records: dict[int, ShardRecord | PixnerdError] = {}  # those that exist, or why they cannot be read
        self._reached: dict[KnownAs, _Reach] = {}

    def read(self) -> None:
        keys = {entry.key for entry in self._store.list(shard_prefix(self._plan.digest, self._size))}
        numbers = [
            number for shard in self._plan.shards for number in self._numbers(shard) if self._key(number) in keys
        ]
        self._records = dict(zip(numbers, in_order(self._record, numbers), strict=True))
        for record in self._records.values():
            if isinstance(record, ShardRecord):
                self.shards += 1
                self.inputs += record.inputs
                self.images += record.accepted
        for shard in self._plan.shards:
            self._check(shard)
        planned = range(self._plan.planned * self._plan.sizes[self._size])
        for key in sorted(keys.difference(map(self._key, planned))):
            if key.endswith(".json"):
                self.note_lasting(self._name(Path(key).stem.lstrip("0") or "0"), "in no plan")

    def objects(self) -> list[str]:
        return self.damaged({key: self._name(n) for n in self._numbers_again() for key in self._candidates(n)})

    def keys_again(self) -> list[str]:
        return [self._key(number) for number in self._numbers_again()]

    def records(self) -> list[str]:
        return [self._key(number) for number in self._numbers_again() if number in self._records]

    def _numbers_again(self) -> Iterator[int]:
        return (number for shard in self.again.values() for number in self._numbers(shard))

    def _candidates(self, number: int) -> Iterator[str]:
        """The objects that a record names; if the record cannot be read, all objects that may be its shard's."""
        record = self._records.get(number)
        if isinstance(record, ShardRecord):
            yield from (data.key for data in index_and_tar(record))
        elif record is not None:
            yield from (entry.key for entry in self._store.list(data_name(self._size, number)))

    def whole(self, number: int) -> ShardRecord | None:
        """The record of a shard, of any edition, unless it cannot be read or the shard is damaged."""
        if any(number in self._numbers(shard) for shard in self.again.values()):
            return None
        record = self._records.get(number) or self._record(number)
        return record if isinstance(record, ShardRecord) else None

    def _check(self, shard: PlannedShard) -> None:
        numbers = self._numbers(shard)
        rows_by_shard: list[list[int]] = []  # of those whose index can be read
        for number in numbers:
            if self.note(self._name(number), examine(partial(self._shard_problems, number, rows_by_shard))):
                self.again[shard.number] = shard
        rows = [row for rows in rows_by_shard for row in rows]
        known = len(rows_by_shard) == len(numbers)
        if known and not _as_planned(rows, shard):
            self._damaged(shard, numbers[0], "not exactly the planned rows, in order")
            known = False
        self._follow(shard, rows if known else None)

    def _shard_problems(self, number: int, rows_by_shard: list[list[int]]) -> Iterator[str]:
        """The rows of its index are added to `rows_by_shard` as soon as they are read."""
        record, index = self._open(number)
        rows_by_shard.append(index["row"].to_pylist())
        causes = Counter(cause for cause in index["cause"].to_pylist() if cause is not None)
        accepted = index.filter(index["accepted"]).to_pylist()
        if causes != record.rejected or len(accepted) != record.accepted:
            yield "its index and its record count differently"
        if len(set(index["key"].to_pylist())) != index.num_rows:
            yield "a key occurs twice"
        if record.tar is None:
            if accepted:
                yield "it has accepted rows but no tar"
            return
        with TemporaryDirectory(prefix="pixnerd-verify-") as folder:
            path = Path(folder, "shard.tar")
            self._store.download(record.tar.key, path)
            yield from _tar_problems(path, record.tar, accepted, self._names)

    def _names(self, row: dict[str, Any]) -> list[str]:
        text = ["txt"] if self._with_text and first_text(row["captions"]) else []
        return [f"{row['key']}.{suffix}" for suffix in (self._suffix, "json", *text)]

    def _open(self, number: int) -> tuple[ShardRecord, pa.Table]:
        record = self._records.get(number)
        if record is None:
            raise DataError("not prepared", remedy="prepare it")
        if isinstance(record, PixnerdError):
            raise record
        index = read_index(self._store, record)
        if not set(INDEX_SCHEMA.names) <= set(index.schema.names):
            raise DataError("its index lacks columns", remedy="make it again")
        return record, index

    def _follow(self, shard: PlannedShard, rows: list[int] | None) -> None:
        """Check that the rows of a shard follow on those of the one before, where the plan holds no row numbers.

        That is so for a tar, and for a retry, whose rows may have gaps.
        """
        if shard.counted and not shard.generation:
            return
        reach = self._reached.setdefault(shard.known_as, _Reach())
        if rows is None:
            reach.known, reach.last = False, None
        elif rows:
            gaps = shard.generation or not reach.known
            if rows[0] < reach.rows or (rows[0] > reach.rows and not gaps):
                problem = f"its first row is {rows[0]}, the shards before it end before row {reach.rows}"
                self._damaged(shard, self._numbers(shard)[0], problem)
                if reach.last is not None:  # nobody can tell which of the two is wrong
                    self.again[reach.last.number] = reach.last
            reach.rows, reach.known, reach.last = rows[-1] + 1, True, shard

    def _record(self, number: int) -> ShardRecord | PixnerdError:
        try:
            record = read_record(self._store, self._key(number), ShardRecord)
        except StoreUnreachable:
            raise
        except PixnerdError as error:
            return error
        own = (record.plan, record.size, record.number) == (self._plan.digest, self._size, number)
        start = data_name(self._size, number)
        if own and all(data.key.startswith(f"{start}{data.sha256}.") for data in index_and_tar(record)):
            return record
        return RecordError("its record speaks of another shard", remedy="make it again")

    def _damaged(self, shard: PlannedShard, number: int, problem: str) -> None:
        self.problems.append(f"{self._name(number)}: {problem}")
        self.again[shard.number] = shard

    def _name(self, number: int | str) -> str:
        return f"shard {number} at {self._size}"

    def _numbers(self, shard: PlannedShard) -> range:
        return self._plan.numbers(shard, self._size)

    def _key(self, number: int) -> str:
        return shard_key(self._plan.digest, self._size, number)


def _as_planned(rows: list[int], shard: PlannedShard) -> bool:
    if shard.generation:  # any rows of the input, each once
        return len(rows) == shard.expected and rows == sorted(set(rows))
    first = shard.part.first if shard.counted else rows[0] if rows else 0
    return rows == list(range(first, first + (shard.expected if shard.counted else len(rows))))


def _tar_problems(path: Path, record: DataObject, accepted: list[dict[str, Any]], names: Names) -> Iterator[str]:
    """`names` gives the names of the members of a row: its image, its JSON, and its text if it has one."""
    if sha256_of(path) != record.sha256:
        yield "its tar does not have the hash in its name"
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        if [member.name for member in members] != [name for row in accepted for name in names(row)]:
            yield "its tar does not hold the accepted rows, in order"
            return
        remaining = iter(members)
        for row in accepted:
            image, sidecar, *text = islice(remaining, len(names(row)))
            places = image.offset_data, image.size, sidecar.offset_data, sidecar.size
            if places != (row["offset"], row["length"], row["json_offset"], row["json_length"]):
                yield f"{image.name} is not where the index says"
            else:
                yield from _image_problems(row, _bytes(tar, image), _bytes(tar, sidecar))
            for member in text:
                if _bytes(tar, member) != first_text(row["captions"]).encode():
                    yield f"{member.name} is not the first caption of the index"


def _image_problems(row: dict[str, Any], image: bytes, sidecar: bytes) -> Iterator[str]:
    if hashlib.sha256(image).digest() != row["image_sha256"]:
        yield f"the image of {row['key']} does not have the index's hash"
    decoded = decode(image)
    if isinstance(decoded, Rejection) or decoded.pixels.shape[:2] != (row["height"], row["width"]):
        yield f"the image of {row['key']} does not have the index's size"
    metadata = json.loads(sidecar)
    if any(metadata.get(name) != row[name] for name in ("key", "source", "captions", "width", "height")):
        yield f"{row['key']}.json and the index disagree"


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()

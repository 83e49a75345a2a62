"""`verify`: read everything that a plan made once more, and hold it against the records."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.decode import decode
from data_prep.plan import PlannedShard, read_plan
from data_prep.rejections import Rejection
from data_prep.sizes import SUFFIX
from infra.errors import PixnerdError
from infra.files import sha256_of
from infra.records import DataObject, ShardRecord
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store


class Verified(NamedTuple):
    shards: int
    inputs: int
    images: int
    problems: list[str]  # none: everything is as its record says


def verify(store: Store, plan: str, edition: str) -> Verified:
    """Hashes, counts and order of every shard at every size; damage is listed, not raised."""
    planned = read_plan(store, plan, edition)
    suffix = SUFFIX[planned.settings["format"]]
    problems: list[str] = []
    shards = inputs = images = 0
    for size in planned.sizes:
        records = {record.number: record for record in list_shards(store, shard_prefix(plan, size))}
        for shard in planned.shards:
            for number in planned.numbers(shard, size):
                if number not in records:
                    problems.append(f"shard {number} at {size}: not prepared")
            here = [records[number] for number in planned.numbers(shard, size) if number in records]
            shards, inputs = shards + len(here), inputs + sum(record.inputs for record in here)
            images += sum(record.accepted for record in here)
            problems += _problems(store, here, shard, suffix)
        ends = planned.planned * planned.sizes[size]
        problems += [f"shard {number} at {size}: in no plan" for number in records if number >= ends]
    return Verified(shards, inputs, images, problems)


def _problems(store: Store, records: list[ShardRecord], shard: PlannedShard, suffix: str) -> list[str]:
    """Of the shards at one size that a planned one became."""
    problems: list[str] = []
    rows: list[int] = []
    for record in records:
        where = f"shard {record.number} at {record.size}"
        try:
            index = read_index(store, record)
            rows += index["row"].to_pylist()
            problems += [f"{where}: {problem}" for problem in _shard_problems(store, record, index, suffix)]
        except (PixnerdError, tarfile.TarError, ValueError, KeyError) as error:
            return [*problems, f"{where}: {error}"]
    if records and not _as_planned(rows, shard):
        problems.append(f"shard {records[0].number} at {records[0].size}: not exactly the planned rows, in order")
    return problems


def _as_planned(rows: list[int], shard: PlannedShard) -> bool:
    if shard.generation:  # any rows of the input, each once
        return len(rows) == shard.expected and rows == sorted(set(rows))
    first = shard.part.first if shard.counted else rows[0] if rows else 0
    return rows == list(range(first, first + (shard.expected if shard.counted else len(rows))))


def _shard_problems(store: Store, record: ShardRecord, index: pa.Table, suffix: str) -> Iterator[str]:
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
        store.download(record.tar.key, path)
        yield from _tar_problems(path, record.tar, accepted, suffix)


def _tar_problems(path: Path, found: DataObject, accepted: list[dict[str, Any]], suffix: str) -> Iterator[str]:
    if sha256_of(path) != found.sha256:
        yield "its tar does not have the hash in its name"
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        names = [name for row in accepted for name in (f"{row['key']}.{suffix}", f"{row['key']}.json")]
        if [member.name for member in members] != names:
            yield "its tar does not hold the accepted rows, in order"
            return
        for row, image, sidecar in zip(accepted, members[::2], members[1::2], strict=True):
            places = image.offset_data, image.size, sidecar.offset_data, sidecar.size
            if places != (row["offset"], row["length"], row["json_offset"], row["json_length"]):
                yield f"{image.name} is not where the index says"
            yield from _image_problems(row, _bytes(tar, image), _bytes(tar, sidecar))


def _image_problems(row: dict[str, Any], image: bytes, sidecar: bytes) -> Iterator[str]:
    if hashlib.sha256(image).digest() != row["image_sha256"]:
        yield f"the image of {row['key']} does not have the index's hash"
    decoded = decode(image)
    if isinstance(decoded, Rejection) or decoded.pixels.shape[:2] != (row["height"], row["width"]):
        yield f"the image of {row['key']} does not have the index's size"
    said = json.loads(sidecar)
    if any(said.get(name) != row[name] for name in ("key", "source", "captions", "width", "height")):
        yield f"{row['key']}.json and the index disagree"


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()

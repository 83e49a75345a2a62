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

import simplejpeg

from data_prep.plan import PlannedShard, read_plan
from infra.errors import PixnerdError
from infra.records import DataObject, ShardRecord
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store


class Verified(NamedTuple):
    shards: int
    inputs: int
    images: int
    problems: list[str]  # none: everything is as its record says


def verify(store: Store, plan: str) -> Verified:
    """Hashes, counts and order of every shard at every size; damage is listed, not raised."""
    planned = read_plan(store, plan)
    problems: list[str] = []
    shards = inputs = images = 0
    for size in json.loads(planned.settings)["sizes"]:
        records = {record.number: record for record in list_shards(store, shard_prefix(plan, str(size)))}
        for shard in planned.shards:
            where = f"shard {shard.number} at {size}"
            record = records.pop(shard.number, None)
            if record is None:
                problems.append(f"{where}: not prepared")
                continue
            shards, inputs, images = shards + 1, inputs + record.inputs, images + record.accepted
            try:
                problems += [f"{where}: {problem}" for problem in _problems(store, record, shard)]
            except (PixnerdError, tarfile.TarError, ValueError, KeyError) as error:
                problems.append(f"{where}: {error}")
        problems += [f"shard {number} at {size}: in no plan" for number in records]
    return Verified(shards, inputs, images, problems)


def _problems(store: Store, record: ShardRecord, shard: PlannedShard) -> Iterator[str]:
    index = read_index(store, record)
    if index["row"].to_pylist() != list(range(shard.part.first, shard.part.first + shard.part.rows)):
        yield "its index does not hold exactly the planned rows, in order"
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
        yield from _tar_problems(path, record.tar, accepted)


def _tar_problems(path: Path, found: DataObject, accepted: list[dict[str, Any]]) -> Iterator[str]:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != found.sha256:
            yield "its tar does not have the hash in its name"
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        names = [name for row in accepted for name in (f"{row['key']}.jpg", f"{row['key']}.json")]
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
        yield f"{row['key']}.jpg does not have the index's hash"
    if simplejpeg.decode_jpeg_header(image)[:2] != (row["height"], row["width"]):
        yield f"{row['key']}.jpg does not have the index's size"
    said = json.loads(sidecar)
    if any(said.get(name) != row[name] for name in ("key", "source", "captions", "width", "height")):
        yield f"{row['key']}.json and the index disagree"


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()

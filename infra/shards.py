"""Writing and reading the shard format.

    shards/<plan>/<size>/00012.json            ShardRecord, written last
    data/<size>/00012-<sha256>.tar             <key>.jpg, <key>.json and <key>.txt of every accepted input, in order
    data/<size>/00012-<sha256>.parquet         the index: one row for every input, accepted or rejected
    snapshots/<digest>.json                    SnapshotRecord
    data/snapshots/<digest>-<sha256>.parquet   the selection: one row for every training sample

A tar's bytes depend on its members only: time, owner, mode and order are fixed. The index tells where in the tar each
image is, so that one image is one ranged read, and the tar is never unpacked. The .txt is for programs that do not know
the index: it is the first caption alone. It is left out if there is no caption, or if the plan's settings say so.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra import layout
from infra.errors import DataError
from infra.records import DataObject, ShardRecord, SnapshotRecord, get_data, read_record
from infra.store import Store

_READERS = 16  # concurrent requests for small objects, which wait for latency, not bandwidth

CAPTIONS = pa.list_(pa.struct([pa.field("kind", pa.string()), pa.field("text", pa.string())]))

# After these follow the columns of the corpus that the user keeps, under their own names.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # a hash: see sample_key
        pa.field("source", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # the image's URL, or a text of the corpus about itself
        pa.field("name", pa.string(), nullable=False),  # what the corpus calls it
        pa.field("row", pa.int64(), nullable=False),  # its row in the planned input file
        pa.field("accepted", pa.bool_(), nullable=False),
        pa.field("cause", pa.string()),  # why it was rejected; null where accepted
        pa.field("detail", pa.string()),
        pa.field("format", pa.string()),  # of the original: "jpeg", "png", ...
        pa.field("original_width", pa.int32()),  # upright
        pa.field("original_height", pa.int32()),
        pa.field("crop_left", pa.int32()),  # the part of the original that was kept, in its pixels
        pa.field("crop_top", pa.int32()),
        pa.field("crop_width", pa.int32()),
        pa.field("crop_height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("offset", pa.int64()),  # of the image in the tar
        pa.field("length", pa.int64()),
        pa.field("json_offset", pa.int64()),
        pa.field("json_length", pa.int64()),
        pa.field("image_sha256", pa.binary(32)),  # of the encoded image
        pa.field("pixels_sha256", pa.binary(32)),  # of its pixels before encoding: equal for exact duplicates
        pa.field("phash", pa.uint64()),  # differs in few bits for near duplicates; null for nearly empty pictures
        pa.field("captions", CAPTIONS, nullable=False),
    ]
)

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("tar", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("caption_weights", pa.list_(pa.float32()), nullable=False),  # sum to 1
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("bucket", pa.dictionary(pa.int32(), pa.string()), nullable=False),  # "WIDTHxHEIGHT"
    ]
)


def selection_schema(labelled: bool = False) -> pa.Schema:
    """That of a snapshot's selection, which has labels if they were asked for."""
    return SELECTION_SCHEMA.append(pa.field("label", pa.int32(), nullable=False)) if labelled else SELECTION_SCHEMA


# Keys are hashes, so their hex digits serve as random numbers. The first SPLIT_DIGITS decide whether a sample is held
# out. The next SPLIT_DIGITS decide whether it is listed once more, where its source's weight is not a whole number.
SPLIT_DIGITS = 8


def sample_key(source: str, name: str) -> str:
    """The key of an input: a hash, so it has no dots or slashes, is evenly distributed, and never changes."""
    return hashlib.sha256(f"{source}\0{name}".encode()).hexdigest()[:20]


def shard_prefix(plan: str, size: str) -> str:
    return layout.SHARD.under(plan=plan, size=size)


def shard_key(plan: str, size: str, number: int) -> str:
    return layout.SHARD.at(plan=plan, size=size, number=number)


def data_name(size: str, number: int) -> str:
    """The beginning of the keys of a shard's tar and index; a hash follows."""
    return layout.IMAGES.named(f"{number:05d}", size=size)


def shard_number(key: str) -> int:
    return int(Path(key).stem)


def tar_number(key: str) -> int:
    """The number of the shard that a tar belongs to: 12 for `data/.../00012-<sha256>.tar`."""
    return int(Path(key).name.partition("-")[0])


def sidecar(fields: Mapping[str, Any]) -> str:
    """The text of a sample's .json."""
    plain = {name: _json_value(value) for name, value in fields.items()}
    return json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _json_value(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_json_value(part) for part in value] if isinstance(value, list) else value


def first_text(captions: Sequence[Mapping[str, str | None]]) -> str:
    """The text of a sample's .txt; empty if it has no caption."""
    return (captions[0]["text"] or "") if captions else ""


# Writing


class Member(NamedTuple):
    offset: int
    length: int


class TarWriter:
    """A tar whose bytes depend on its members only. Without `finish` it lacks its end, so that readers refuse it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hash of everything written so far."""
        return self._sha256.hexdigest()

    def add(self, name: str, data: bytes) -> Member:
        self._write(_header(name, len(data)))
        member = Member(self._size, len(data))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return member

    def finish(self) -> None:
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)


@cache
def _empty_header() -> bytes:
    """The header of an empty member, without name and checksum."""
    info = tarfile.TarInfo()
    info.mode = 0o644
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[148:156] = b" " * 8
    return bytes(header)


def _header(name: str, size: int) -> bytes:
    """What tarfile would write, in a tenth of its time: a shard has thousands of members."""
    encoded, length = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= 100 and len(length) == 11, "members have short names and less than 8 GiB"
    header = bytearray(_empty_header())
    header[: len(encoded)] = encoded
    header[124:135] = length
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


# Reading


def list_shards(store: Store, prefix: str, numbers: Container[int] | None = None) -> Iterator[ShardRecord]:
    """The shard records under a prefix, by number, read a few at a time; only those of `numbers`, if given."""
    keys = [entry.key for entry in store.list(prefix) if entry.key.endswith(".json")]
    keys = [key for key in keys if numbers is None or shard_number(key) in numbers]
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(keys), 64 * _READERS):
            yield from pool.map(lambda key: read_record(store, key, ShardRecord), keys[start : start + 64 * _READERS])


def read_index(store: Store, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
    return read_parquet(store, record.index, columns)


def read_selection(
    store: Store, record: SnapshotRecord, *, held_out: bool = False, columns: Sequence[str] | None = None
) -> pa.Table:
    """The samples of a snapshot, in the order of shards and inputs (see SELECTION_SCHEMA)."""
    return read_parquet(store, record.held_out if held_out else record.selection, columns).unify_dictionaries()


def read_parquet(store: Store, table: DataObject, columns: Sequence[str] | None) -> pa.Table:
    data = get_data(store, table)
    try:
        return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{store.url}/{table.key} is not a readable table ({error})",
            remedy="it was written by another program or version: one of shards, scores, snapshots or downloads goes "
            "with `pixnerd data verify --drop-damaged`, another with the record that names it; then run again",
        ) from None

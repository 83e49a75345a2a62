"""Raw items -> one shard at every size: the work of one task, whole and repeatable.

Data goes to the store first, under names that hold its hash, and each size's record last. Nothing here depends on who
does the work or when, so doing it twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from data_prep import sources
from data_prep.decode import Decoded, decode, decoder_versions
from data_prep.plan import PlannedShard, PrepareSettings
from data_prep.rejections import Rejection
from data_prep.sources import RawItem
from data_prep.transform import Box, encode_jpeg, square
from infra.records import ShardRecord, put_data, read_record, write_record
from infra.shards import INDEX_SCHEMA, TarWriter, parquet_bytes, shard_key
from infra.store import Store

Decoder = Callable[..., Decoded | Rejection]


class Made(NamedTuple):
    """A picture at one size."""

    data: bytes
    pixels_sha256: bytes
    width: int
    height: int
    box: Box  # of the original


class Picture(NamedTuple):
    """A decoded original and what was made of it at every size."""

    format: str
    width: int
    height: int
    sizes: list[Made | Rejection]


Outcome = Picture | Rejection


def make_picture(data: bytes, settings: PrepareSettings, decoder: Decoder = decode) -> Outcome:
    decoded = decoder(data, max_pixels=settings.max_pixels, matte=settings.matte)
    if isinstance(decoded, Rejection):
        return decoded
    height, width, _ = decoded.pixels.shape
    sizes: list[Made | Rejection] = []
    for size in settings.sizes:
        found = square(decoded.pixels, size)
        if isinstance(found, Rejection):
            sizes.append(found)
            continue
        pixels, box = found
        encoded = encode_jpeg(pixels, settings.jpeg_quality, settings.jpeg_subsampling)
        sizes.append(Made(encoded, hashlib.sha256(pixels.data).digest(), size, size, box))
    return Picture(decoded.format, width, height, sizes)


Outcomes = Callable[[Iterable[RawItem]], Iterator[tuple[RawItem, Outcome]]]


def plain_outcomes(
    items: Iterable[RawItem], settings: PrepareSettings, decoder: Decoder = decode
) -> Iterator[tuple[RawItem, Outcome]]:
    for item in items:
        found = item.image
        yield item, found if isinstance(found, Rejection) else make_picture(found, settings, decoder)


def make_shard(
    store: Store, settings: PrepareSettings, plan: str, shard: PlannedShard, outcomes: Outcomes
) -> list[ShardRecord]:
    """Make the shard at every size and return the records; `outcomes` is how items become pictures."""
    source = next(source for source in settings.sources if source.name == shard.source)
    schema = pa.schema([*INDEX_SCHEMA, *sources.kept_fields(source, store, shard.part)])
    with ExitStack() as files:
        # Files without a name: a worker that is killed leaves nothing on the disk.
        writers = [_Writer(files.enter_context(tempfile.TemporaryFile()), source.name) for _ in settings.sizes]
        for item, outcome in outcomes(sources.items(source, store, shard.part)):
            for number, writer in enumerate(writers):
                writer.add(item, outcome, number)
        return [
            writer.commit(store, plan, str(size), shard.number, schema)
            for size, writer in zip(settings.sizes, writers, strict=True)
        ]


class _Writer:
    """One shard at one size, row by row."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._tar = TarWriter(file)
        self._source = source
        self._rows: list[dict[str, Any]] = []
        self._rejected: Counter[str] = Counter()

    def add(self, item: RawItem, outcome: Outcome, size_number: int) -> None:
        made: Made | Rejection
        row = {
            "key": item.key,
            "source": self._source,
            "licence": item.licence,
            "name": item.name,
            "row": item.row,
            "captions": item.captions,
            **item.kept,
        }
        if isinstance(outcome, Picture):
            row |= {"format": outcome.format, "original_width": outcome.width, "original_height": outcome.height}
            made = outcome.sizes[size_number]
        else:
            made = outcome
        row["accepted"] = isinstance(made, Made)
        if isinstance(made, Made):
            row |= self._put(item, row, made)
        else:
            self._rejected[made.cause.value] += 1
            row |= {"cause": made.cause.value, "detail": _printable(made.detail)}
        self._rows.append(row)

    def _put(self, item: RawItem, row: dict[str, Any], made: Made) -> dict[str, Any]:
        row = row | {f"crop_{side}": value for side, value in made.box._asdict().items()}
        row |= {"width": made.width, "height": made.height}
        image = self._tar.add(f"{item.key}.jpg", made.data)
        said = {name: _json_value(value) for name, value in row.items() if name not in ("accepted", "row")}
        text = json.dumps(said, sort_keys=True, ensure_ascii=False, allow_nan=False)
        sidecar = self._tar.add(f"{item.key}.json", text.encode())
        return row | {
            "offset": image.offset,
            "length": image.length,
            "json_offset": sidecar.offset,
            "json_length": sidecar.length,
            "image_sha256": hashlib.sha256(made.data).digest(),
            "pixels_sha256": made.pixels_sha256,
        }

    def commit(self, store: Store, plan: str, size: str, number: int, schema: pa.Schema) -> ShardRecord:
        self._tar.finish()
        self._file.flush()
        path = Path(f"/proc/self/fd/{self._file.fileno()}")
        accepted = len(self._rows) - self._rejected.total()
        index = pa.Table.from_pylist(self._rows, schema=schema)
        where, name = f"data/{size}", f"{number:05d}"
        record = ShardRecord(
            plan=plan,
            size=size,
            number=number,
            tar=put_data(store, where, f"{name}.tar", path) if accepted else None,
            index=put_data(store, where, f"{name}.parquet", parquet_bytes(index)),
            accepted=accepted,
            rejected=dict(sorted(self._rejected.items())),
            versions=decoder_versions(),
        )
        key = shard_key(plan, size, number)
        return record if write_record(store, key, record) else read_record(store, key, ShardRecord)


def _json_value(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_json_value(part) for part in value] if isinstance(value, list) else value


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()

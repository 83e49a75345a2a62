"""Raw items -> their shards at every size: the work of one task, which can be repeated and gives the same bytes.

Data goes to the store first, under names that hold its hash, and the record of each shard last. Nothing here depends on
which machine does the work, or when.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import cache, partial
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from data_prep.images.decode import Decoded, Pixels_HW3, decode, decoder_versions
from data_prep.images.phash import phash
from data_prep.images.sizes import SUFFIX, Size, size_name
from data_prep.images.transform import Box, encode, fitted
from data_prep.prepare import linked
from data_prep.prepare.linked import Linked
from data_prep.prepare.plan import Plan, PlannedShard, PrepareSettings
from data_prep.rejections import Rejection
from data_prep.sources import RawItem, Url, UrlSource
from infra import layout
from infra.records import ShardRecord, put_data, recorded
from infra.shards import INDEX_SCHEMA, TarWriter, first_text, parquet_bytes, shard_key, sidecar
from infra.store import Store, spool_path

Decoder = Callable[..., Decoded | Rejection]

# Options of glibc's malloc: M_TRIM_THRESHOLD, the free bytes that it keeps, and M_MMAP_THRESHOLD at its largest.
MALLOPT = {-1: 64 << 20, -3: 32 << 20}


class Resized(NamedTuple):
    """A picture at one size."""

    data: bytes
    pixels_sha256: bytes
    phash: int | None
    width: int
    height: int
    box: Box  # of the original


class Picture(NamedTuple):
    """A decoded original and what was made of it at every size."""

    format: str
    width: int
    height: int
    sizes: list[Resized | Rejection]


Outcome = Picture | Rejection


def make_picture(data: bytes, settings: PrepareSettings, decoder: Decoder = decode) -> Outcome:
    decoded = decoder(data, max_pixels=settings.max_pixels, matte=settings.matte)
    if isinstance(decoded, Rejection):
        return decoded
    height, width, _ = decoded.pixels.shape
    return Picture(decoded.format, width, height, [_resized(decoded.pixels, size, settings) for size in settings.sizes])


def _resized(pixels_HW3: Pixels_HW3, size: Size, settings: PrepareSettings) -> Resized | Rejection:
    resized = fitted(pixels_HW3, size, settings.resize)
    if isinstance(resized, Rejection):
        return resized
    pixels, box = resized
    encoded = encode(pixels, settings.format, settings.quality, settings.subsampling)
    height, width, _ = pixels.shape
    return Resized(encoded, hashlib.sha256(pixels.data).digest(), phash(pixels), width, height, box)


Outcomes = Callable[[Iterable[RawItem]], Iterator[tuple[RawItem, Outcome]]]


def plain_outcomes(
    items: Iterable[RawItem], settings: PrepareSettings, decoder: Decoder = decode
) -> Iterator[tuple[RawItem, Outcome]]:
    return outcomes_of(items, partial(make_picture, settings=settings, decoder=decoder))


def outcomes_of(items: Iterable[RawItem], picture_of: Callable[[bytes], Outcome]) -> Iterator[tuple[RawItem, Outcome]]:
    for item in items:
        assert not isinstance(item.image, Url), "it must be downloaded first"
        yield item, item.image if isinstance(item.image, Rejection) else picture_of(item.image)


def make_shard(
    store: Store,
    settings: PrepareSettings,
    plan: Plan,
    shard: PlannedShard,
    originals: Linked | None,
    outcomes: Outcomes,
) -> list[ShardRecord]:
    """Make the shards that a planned shard becomes, at every size, and return their records.

    `originals` says where the images of a list of URLs are, and `outcomes` turns items into pictures.
    """
    _keep_freed_memory()
    source = next(source for source in settings.sources if source.name == shard.source)
    schema = pa.schema([*INDEX_SCHEMA, *source.kept_fields(store, shard.part)])
    with ExitStack() as files:

        def start() -> _Writer:
            return _Writer(files.enter_context(store.spool()), source.name, settings)

        series = []
        for size in map(size_name, settings.sizes):
            targets = [Target(store, plan.digest, size, number, schema) for number in plan.numbers(shard, size)]
            series.append(_Series(start, targets, settings.rows))
        if isinstance(source, UrlSource):
            assert originals is not None, "they must be downloaded first"
            items = linked.items(store, source, settings.fetch, originals, shard.part)
        else:
            items = source.items(store, shard.part)
        for item, outcome in outcomes(items):
            for place, of_size in enumerate(series):
                of_size.add(item, outcome, place)
        return [record for of_size in series for record in of_size.finish()]


@cache
def _keep_freed_memory() -> None:
    """Let malloc keep freed memory for the next picture.

    Memory given back to the kernel comes again page by page, each of them zeroed: a fortieth of a worker's CPU time.
    Systems without glibc are left as they are.
    """
    with suppress(AttributeError, OSError):
        for parameter, size in MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, size)


class Target(NamedTuple):
    """The place and the schema of a shard to be written."""

    store: Store
    plan: str
    size: str
    number: int
    schema: pa.Schema


class _Series:
    """The shards of one size that a planned shard becomes, filled in order; the last one takes all that is left."""

    def __init__(self, start: Callable[[], _Writer], targets: list[Target], rows: int) -> None:
        self._start, self._targets, self._rows = start, targets, -(-rows // len(targets))
        self._writer = start()
        self._records: list[ShardRecord] = []

    def add(self, item: RawItem, outcome: Outcome, place: int) -> None:
        if len(self._writer) == self._rows and len(self._records) < len(self._targets) - 1:
            self._commit()
        self._writer.add(item, outcome, place)

    def finish(self) -> list[ShardRecord]:
        while len(self._records) < len(self._targets):
            self._commit()
        return self._records

    def _commit(self) -> None:
        self._records.append(self._writer.commit(self._targets[len(self._records)]))
        self._writer = self._start()


class _Writer:
    """Writes one shard, row by row."""

    def __init__(self, file: BinaryIO, source: str, settings: PrepareSettings) -> None:
        self._file, self._tar = file, TarWriter(file)
        self._source, self._suffix, self._with_text = source, SUFFIX[settings.format], settings.text
        self._rows: list[dict[str, Any]] = []
        self._rejected: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, item: RawItem, outcome: Outcome, place: int) -> None:
        resized = outcome.sizes[place] if isinstance(outcome, Picture) else outcome
        row = {
            "key": item.key,
            "source": self._source,
            "licence": item.licence,
            "origin": item.origin,
            "name": item.name,
            "row": item.row,
            "captions": item.captions,
            **item.kept,
        }
        if isinstance(outcome, Picture):
            row |= {"format": outcome.format, "original_width": outcome.width, "original_height": outcome.height}
        row["accepted"] = isinstance(resized, Resized)
        if isinstance(resized, Resized):
            row |= self._put(item, row, resized)
        else:
            self._rejected[resized.cause.value] += 1
            detail = resized.detail.encode(errors="backslashreplace").decode()  # a file's name may be no valid text
            row |= {"cause": resized.cause.value, "detail": detail}
        self._rows.append(row)

    def _put(self, item: RawItem, row: dict[str, Any], resized: Resized) -> dict[str, Any]:
        row = row | {f"crop_{side}": value for side, value in resized.box._asdict().items()}
        row |= {"width": resized.width, "height": resized.height}
        image = self._tar.add(f"{item.key}.{self._suffix}", resized.data)
        metadata = {name: value for name, value in row.items() if name not in ("accepted", "row")}
        json_member = self._tar.add(f"{item.key}.json", sidecar(metadata).encode())
        if self._with_text and (caption := first_text(item.captions)):
            self._tar.add(f"{item.key}.txt", caption.encode())
        return row | {
            "offset": image.offset,
            "length": image.length,
            "json_offset": json_member.offset,
            "json_length": json_member.length,
            "image_sha256": hashlib.sha256(resized.data).digest(),
            "pixels_sha256": resized.pixels_sha256,
            "phash": resized.phash,
        }

    def commit(self, target: Target) -> ShardRecord:
        self._tar.finish()
        accepted = len(self._rows) - self._rejected.total()
        index = pa.Table.from_pylist(self._rows, schema=target.schema)
        store, where, name = target.store, layout.IMAGES.at(size=target.size), f"{target.number:05d}"
        tar = put_data(store, where, f"{name}.tar", spool_path(self._file), self._tar.sha256) if accepted else None
        record = ShardRecord(
            plan=target.plan,
            size=target.size,
            number=target.number,
            tar=tar,
            index=put_data(store, where, f"{name}.parquet", parquet_bytes(index)),
            accepted=accepted,
            rejected=dict(sorted(self._rejected.items())),
            versions=decoder_versions(),
        )
        self._file.close()
        return recorded(store, shard_key(target.plan, target.size, target.number), record)

"""Raw items -> their shards at every size: the work of one task, whole and repeatable.

Data goes to the store first, under names that hold its hash, and each size's record last. Nothing here depends on who
does the work or when, so doing it twice gives the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
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
from data_prep.sources import Range, RawItem, Source, Url, UrlSource
from infra import layout
from infra.records import ShardRecord, put_data, read_record, write_record
from infra.shards import INDEX_SCHEMA, TarWriter, first_text, parquet_bytes, shard_key, sidecar
from infra.store import Store, spool_path

Decoder = Callable[..., Decoded | Rejection]

# Of glibc's malloc: M_TRIM_THRESHOLD, the free bytes that it keeps, and M_MMAP_THRESHOLD, at the most that it takes.
MALLOPT = {-1: 64 << 20, -3: 32 << 20}


class Made(NamedTuple):
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
    sizes: list[Made | Rejection]


Outcome = Picture | Rejection


def make_picture(data: bytes, settings: PrepareSettings, decoder: Decoder = decode) -> Outcome:
    decoded = decoder(data, max_pixels=settings.max_pixels, matte=settings.matte)
    if isinstance(decoded, Rejection):
        return decoded
    height, width, _ = decoded.pixels.shape
    return Picture(decoded.format, width, height, [_made(decoded.pixels, size, settings) for size in settings.sizes])


def _made(pixels_HW3: Pixels_HW3, size: Size, settings: PrepareSettings) -> Made | Rejection:
    found = fitted(pixels_HW3, size)
    if isinstance(found, Rejection):
        return found
    pixels, box = found
    encoded = encode(pixels, settings.format, settings.quality, settings.subsampling)
    height, width, _ = pixels.shape
    return Made(encoded, hashlib.sha256(pixels.data).digest(), phash(pixels), width, height, box)


Outcomes = Callable[[Iterable[RawItem]], Iterator[tuple[RawItem, Outcome]]]


def plain_outcomes(
    items: Iterable[RawItem], settings: PrepareSettings, decoder: Decoder = decode
) -> Iterator[tuple[RawItem, Outcome]]:
    for item in items:
        found = item.image
        assert not isinstance(found, Url), "it must be downloaded first"
        yield item, found if isinstance(found, Rejection) else make_picture(found, settings, decoder)


def make_shard(
    store: Store,
    settings: PrepareSettings,
    plan: Plan,
    shard: PlannedShard,
    originals: Linked | None,
    outcomes: Outcomes,
) -> list[ShardRecord]:
    """Make the shards that a planned one becomes and return their records; `outcomes` is how items become pictures.

    A list of URLs has its `originals`.
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
        for item, outcome in outcomes(_items(store, settings, source, shard.part, originals)):
            for place, each in enumerate(series):
                each.add(item, outcome, place)
        return [record for each in series for record in each.finish()]


@cache
def _keep_freed_memory() -> None:
    """Let the next picture have the memory of the last one.

    Given back to the kernel it would come again page by page, each of them zeroed: a fortieth of a worker's CPU time.
    Other systems than glibc's have their own ways.
    """
    with suppress(AttributeError, OSError):
        for parameter, size in MALLOPT.items():
            ctypes.CDLL(None).mallopt(parameter, size)


def _items(
    store: Store, settings: PrepareSettings, source: Source, part: Range, originals: Linked | None
) -> Iterator[RawItem]:
    if isinstance(source, UrlSource):
        assert originals is not None, "they must be downloaded first"
        return linked.items(store, source, settings.fetch, originals, part)
    return source.items(store, part)


class Target(NamedTuple):
    """Where a shard goes."""

    store: Store
    plan: str
    size: str
    number: int
    schema: pa.Schema


class _Series:
    """The shards at one size that a planned one becomes: rows are dealt out in order, and the last takes the rest."""

    def __init__(self, start: Callable[[], _Writer], targets: list[Target], rows: int) -> None:
        self._start, self._targets, self._rows = start, targets, -(-rows // len(targets))
        self._writer = start()
        self._records: list[ShardRecord] = []

    def add(self, item: RawItem, outcome: Outcome, place: int) -> None:
        if len(self._writer) == self._rows and len(self._records) < len(self._targets) - 1:
            self._turn()
        self._writer.add(item, outcome, place)

    def finish(self) -> list[ShardRecord]:
        while len(self._records) < len(self._targets):
            self._turn()
        return self._records

    def _turn(self) -> None:
        self._records.append(self._writer.commit(self._targets[len(self._records)]))
        self._writer = self._start()


class _Writer:
    """One shard, row by row."""

    def __init__(self, file: BinaryIO, source: str, settings: PrepareSettings) -> None:
        self._file, self._tar = file, TarWriter(file)
        self._source, self._suffix, self._with_text = source, SUFFIX[settings.format], settings.text
        self._rows: list[dict[str, Any]] = []
        self._rejected: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, item: RawItem, outcome: Outcome, place: int) -> None:
        made: Made | Rejection
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
            made = outcome.sizes[place]
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
        image = self._tar.add(f"{item.key}.{self._suffix}", made.data)
        said = {name: value for name, value in row.items() if name not in ("accepted", "row")}
        beside = self._tar.add(f"{item.key}.json", sidecar(said).encode())
        if self._with_text and (caption := first_text(item.captions)):
            self._tar.add(f"{item.key}.txt", caption.encode())
        return row | {
            "offset": image.offset,
            "length": image.length,
            "json_offset": beside.offset,
            "json_length": beside.length,
            "image_sha256": hashlib.sha256(made.data).digest(),
            "pixels_sha256": made.pixels_sha256,
            "phash": made.phash,
        }

    def commit(self, to: Target) -> ShardRecord:
        self._tar.finish()
        accepted = len(self._rows) - self._rejected.total()
        index = pa.Table.from_pylist(self._rows, schema=to.schema)
        where, name = layout.IMAGES.at(size=to.size), f"{to.number:05d}"
        tar = put_data(to.store, where, f"{name}.tar", spool_path(self._file), self._tar.sha256) if accepted else None
        record = ShardRecord(
            plan=to.plan,
            size=to.size,
            number=to.number,
            tar=tar,
            index=put_data(to.store, where, f"{name}.parquet", parquet_bytes(index)),
            accepted=accepted,
            rejected=dict(sorted(self._rejected.items())),
            versions=decoder_versions(),
        )
        self._file.close()
        key = shard_key(to.plan, to.size, to.number)
        return record if write_record(to.store, key, record) else read_record(to.store, key, ShardRecord)


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()

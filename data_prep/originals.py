"""Downloaded originals, kept: so that another size or quality needs no second download.

    originals/<place>/0/00012.json       OriginalsRecord: rows 12 ROWS .. 13 ROWS of an input, written last
    originals/<place>/1/again.json       RetryRecord: those that failed in generation 0 for causes that can pass
    originals/<place>/1/00000.json       ... and what came of trying them again
    data/originals/00012-<sha256>.tar    the bytes, in the order they came: <row>.<jpg|png|...>
    data/originals/00012-<sha256>.parquet  one row for every URL: what was answered, or why there is no image

The place is the digest of the input, its column of URLs, and the settings that decide what may be downloaded; captions,
sizes and formats are no part of it. A later generation changes no earlier one.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep import sources
from data_prep.decode import sniff
from data_prep.fetch import Fetched, FetchSettings, fetch
from data_prep.rejections import TRANSIENT, Cause, Rejection
from data_prep.sources import ROW, Input, Range, RawItem, UrlList, parquet
from data_prep.sources.raw import TABLES
from data_prep.stream import in_order
from infra.config import digest
from infra.errors import DataError
from infra.records import DataObject, Record, fetch_data, put_data, read_record, write_record
from infra.shards import TarWriter, parquet_bytes, read_parquet
from infra.store import FileStore, Store, spool_path

FORMAT = 1
ROWS = 1024  # of an originals' shard: about 256 MiB of photographs from the web
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # in its input
        pa.field("url", pa.string(), nullable=False),  # as it was asked for
        pa.field("cause", pa.string()),  # why there is no image; null where there is one
        pa.field("detail", pa.string()),
        pa.field("status", pa.int32()),  # of the last answer
        pa.field("answered_by", pa.string()),  # the URL after redirects
        pa.field("content_type", pa.string()),
        pa.field("tries", pa.int32(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("sha256", pa.binary(32)),
    ]
)


class OriginalsRecord(Record):
    place: str
    generation: int
    number: int
    tar: DataObject | None  # None where nothing came
    index: DataObject
    accepted: int
    rejected: dict[str, int]  # cause -> count

    @property
    def inputs(self) -> int:
        return self.accepted + sum(self.rejected.values())


class RetryRecord(Record):
    """What a generation tries again."""

    table: DataObject  # `row` in the input, and `cause`
    rows: int
    causes: dict[str, int]  # why they had failed -> count


class Work(NamedTuple):
    """An originals' shard, to be made or made already."""

    source: str
    place: str
    generation: int
    number: int
    part: Range

    @property
    def folder(self) -> str:
        return f"originals/{self.place}/{self.generation}/"

    @property
    def key(self) -> str:
        return f"{self.folder}{self.number:05d}.json"


def place(source: UrlList, name: str, sha256: str, settings: FetchSettings) -> str:
    """Where the originals of an input lie."""
    asked = {"column": source.image, "max_bytes": source.max_bytes, "settings": settings.results()}
    return digest({"format": FORMAT, "input": [name, sha256], "asked": asked})


def retries(store: Store, where: str) -> list[RetryRecord]:
    """What each generation after the first tries again."""
    found: list[RetryRecord] = []
    while store.exists(key := _again_key(where, len(found) + 1)):
        found.append(read_record(store, key, RetryRecord))
    return found


def _again_key(where: str, generation: int) -> str:
    return f"originals/{where}/{generation}/again.json"


def works(source: UrlList, where: str, generation: int, whole: Range) -> list[Work]:
    """The originals' shards of a whole input (or of all that a generation tries again)."""
    firsts = range(0, whole.rows, ROWS)
    parts = [whole._replace(first=first, rows=min(ROWS, whole.rows - first)) for first in firsts]
    return [Work(source.name, where, generation, number, part) for number, part in enumerate(parts)]


def make(store: Store, source: UrlList, settings: FetchSettings, todo: Work) -> OriginalsRecord:
    """Download one shard's images; done already if it has a record."""
    if store.exists(todo.key):
        return read_record(store, todo.key, OriginalsRecord)
    asked = list(sources.urls(source, store, todo.part))
    rows: list[dict[str, Any]] = []
    with (
        store.spool() as file,
        closing(fetch((url for _, url in asked), settings, source.max_bytes)) as answers,
    ):
        tar = TarWriter(file)
        for answer in answers:
            number, url = asked[answer.number]
            row = {"row": number, "url": "" if isinstance(url, Rejection) else url}
            rows.append(row | _said(answer) | _put(tar, number, answer.data))
        tar.finish()
        assert len(rows) == len(asked), "a URL was lost or counted twice"
        rows.sort(key=lambda row: row["row"])
        causes = Counter(row["cause"] for row in rows if row["cause"])
        accepted, name = len(rows) - causes.total(), f"{todo.number:05d}"
        record = OriginalsRecord(
            place=todo.place,
            generation=todo.generation,
            number=todo.number,
            tar=put_data(store, "data/originals", f"{name}.tar", spool_path(file), tar.sha256) if accepted else None,
            index=put_data(store, "data/originals", f"{name}.parquet", _index(rows)),
            accepted=accepted,
            rejected=dict(sorted(causes.items())),
        )
    return record if write_record(store, todo.key, record) else read_record(store, todo.key, OriginalsRecord)


def _said(answer: Fetched) -> dict[str, Any]:
    said = {
        "status": answer.status,
        "answered_by": answer.url,
        "content_type": answer.content_type,
        "tries": answer.tries,
    }
    if isinstance(answer.data, Rejection):
        said |= {"cause": answer.data.cause.value, "detail": answer.data.detail}
    return said


def _put(tar: TarWriter, row: int, data: bytes | Rejection) -> dict[str, Any]:
    if isinstance(data, Rejection):
        return {"cause": data.cause.value}
    member = tar.add(f"{row:09d}.{SUFFIXES.get(sniff(data) or '', 'bin')}", data)
    return {"cause": None, "offset": member.offset, "length": member.length, "sha256": hashlib.sha256(data).digest()}


def _index(rows: list[dict[str, Any]]) -> bytes:
    return parquet_bytes(pa.Table.from_pylist(rows, schema=SCHEMA))


# Reading


def items(store: Store, source: UrlList, done: list[Work], part: Range) -> Iterator[RawItem]:
    """The raw items of a range of rows, with the bytes that were downloaded for them; `done` holds just these rows."""
    for item, (row, image) in zip(sources.items(source, store, part), _images(store, done, part), strict=True):
        assert item.row == row, "originals and rows are out of step"
        yield item._replace(image=_outcome(item.image, image))


def _outcome(asked: bytes | str | Rejection, answer: bytes | Rejection) -> bytes | Rejection:
    """A failed download comes before what is wrong with a caption: it alone may pass."""
    if isinstance(answer, Rejection) or not isinstance(asked, Rejection):
        return answer
    return asked


def _images(store: Store, done: list[Work], part: Range) -> Iterator[tuple[int, bytes | Rejection]]:
    for work in done:
        record = read_record(store, work.key, OriginalsRecord)
        first = max(part.first, work.part.first) - work.part.first
        last = min(part.first + part.rows, work.part.first + work.part.rows) - work.part.first
        columns = ["row", "cause", "detail", "offset", "length", "sha256"]
        rows = read_parquet(store, record.index, columns).slice(first, last - first)
        yield from _read(store, record, rows.to_pylist())


def _read(store: Store, record: OriginalsRecord, rows: list[dict[str, Any]]) -> Iterator[tuple[int, bytes | Rejection]]:
    if record.tar is None or not any(row["cause"] is None for row in rows):
        yield from ((row["row"], Rejection(Cause(row["cause"]), row["detail"])) for row in rows)
        return
    if not store.exists(record.tar.key):
        raise DataError(
            f"the originals {store.url}/{record.tar.key} are gone",
            remedy=f"delete {store.url}/originals/{record.place}/ as well, then they are downloaded again",
        )
    with _reader(store, record.tar) as read:
        for row in rows:
            if row["cause"] is not None:
                yield row["row"], Rejection(Cause(row["cause"]), row["detail"])
            else:
                yield row["row"], read(row)


@contextmanager
def _reader(store: Store, tar: DataObject) -> Iterator[Callable[[dict[str, Any]], bytes]]:
    """How a row's image is read, and held against a hash.

    What is on this machine is read where it lies. Elsewhere one request for the whole tar takes the place of one an
    image; the copy is open and without a name, so that it is gone with this process.
    """
    if isinstance(store, FileStore):
        with store.opened(tar.key) as file:
            yield lambda row: _checked(store, tar, row, _slice(file, row))
        return
    with tempfile.TemporaryDirectory(prefix="pixnerd-originals-") as folder:
        path = Path(folder, "tar")
        fetch_data(store, tar, path)
        with path.open("rb") as file:
            path.unlink()
            yield lambda row: _slice(file, row)


def _slice(file: BinaryIO, row: dict[str, Any]) -> bytes:
    file.seek(row["offset"])
    return file.read(row["length"])


def _checked(store: Store, tar: DataObject, row: dict[str, Any], data: bytes) -> bytes:
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise DataError(
            f"{store.url}/{tar.key} is damaged: row {row['row']} is not what was downloaded",
            remedy="delete it and the record that names it, then run again: it is downloaded anew",
        )
    return data


# Trying again


def retry(store: Store, source: UrlList, found: Input, whole: Range, settings: FetchSettings) -> int:
    """Begin a generation of what failed in the newest one for causes that can pass; how many inputs that are."""
    where = place(source, found.name, found.sha256, settings)
    before = retries(store, where)
    if before and not any(store.list(f"originals/{where}/{len(before)}/0")):
        return 0  # one has just been begun, for another stage or source with the same list
    tried = whole
    if before:
        tried = whole._replace(table=before[-1].table.key, in_store=True, rows=before[-1].rows)
    failed = pa.concat_tables([_failed(store, todo) for todo in works(source, where, len(before), tried)])
    if failed.num_rows:
        again = RetryRecord(
            table=put_data(store, "data/originals", "again.parquet", parquet_bytes(failed)),
            rows=failed.num_rows,
            causes=dict(sorted(Counter(failed["cause"].to_pylist()).items())),
        )
        write_record(store, _again_key(where, len(before) + 1), again)
    return int(failed.num_rows)


def _failed(store: Store, todo: Work) -> pa.Table:
    """The rows of an originals' shard that failed for causes that can pass."""
    if not store.exists(todo.key):
        raise DataError(f"the downloads of {todo.part.input} are not finished", remedy="prepare without a retry first")
    rows = read_parquet(store, read_record(store, todo.key, OriginalsRecord).index, ["row", "cause"])
    return rows.filter(pc.is_in(rows["cause"], pa.array([cause.value for cause in TRANSIENT])))


def rows_again(store: Store, source: UrlList, whole: Range, again: RetryRecord) -> str:
    """A table in the store of the rows that are tried again, with the columns that the source asks for today."""
    rows = read_parquet(store, again.table, ["row"])["row"].to_numpy()
    found, first = [], 0
    with parquet.opened(parquet.open_rows(source, store, whole), whole.table) as file:
        for batch in file.iter_batches():
            numbers = np.arange(first, first + batch.num_rows)
            chosen = np.isin(numbers, rows)
            part = pa.Table.from_batches([batch]).filter(pa.array(chosen))
            found.append(part.append_column(ROW, pa.array(numbers[chosen])))
            first += batch.num_rows
    return put_data(store, TABLES, f"{source.name}.parquet", parquet_bytes(pa.concat_tables(found))).key


def without_tar(store: Store, done: Iterable[Work]) -> set[Work]:
    """Those whose tar has been dropped: their records go as well, so that they are downloaded again."""

    def is_lost(todo: Work) -> bool:
        tar = read_record(store, todo.key, OriginalsRecord).tar
        return tar is not None and not store.exists(tar.key)

    works = list(done)
    lost = {todo for todo, gone in zip(works, in_order(is_lost, works), strict=True) if gone}
    for todo in lost:
        store.delete(todo.key)
    return lost


def drop(store: Store, done: list[Work]) -> None:
    """Delete the tars; what was answered stays on record."""
    for todo in done:
        tar = read_record(store, todo.key, OriginalsRecord).tar
        if tar is not None:
            store.delete(tar.key)

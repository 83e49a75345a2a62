"""Batches of downloaded originals, kept by their URLs, so that no list, size or setting downloads one twice.

    downloads/batches/<batch>.0.json          BatchRecord: up to 1,024 URLs that were asked for together, written last
    downloads/batches/<batch>.0.dropped.json  its tar is no longer kept
    downloads/batches/<batch>.1.json          the record of its second download, if it was needed after that
    data/originals/<batch>-<sha256>.tar       the bytes, in the order they came: <hash of the URL>.<jpg|png|...>
    data/originals/<batch>-<sha256>.parquet   one row for every URL, in the order in which they were first asked for

A batch is named after its URLs and the settings of its download, and belongs to no list. `catalogue` finds the batch of
a URL; `links` holds which originals the rows of a list are made of.

The downloader's settings decide which URLs are tried again (`reopened`) and which downloaded bytes are used (`Limits`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.images.decode import sniff
from data_prep.rejections import Cause, Rejection
from data_prep.sources.reading import in_order
from data_prep.web.fetch import Fetched, FetchSettings, fetch
from infra import layout
from infra.config import canonical_json
from infra.errors import DataError
from infra.records import DataObject, Record, put_data, read_record, recorded, write_record
from infra.shards import TarWriter, parquet_bytes, read_parquet
from infra.store import Store, spool_path

ROWS = 1024  # URLs of a batch: about 256 MiB of photographs from the web
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}

SCHEMA = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False),  # as it was asked for
        pa.field("cause", pa.string()),  # why there is no image; null where there is one
        pa.field("detail", pa.string()),
        pa.field("status", pa.int32()),  # of the last response
        pa.field("answered_by", pa.string()),  # the URL after redirects
        pa.field("content_type", pa.string()),
        pa.field("tries", pa.int32(), nullable=False),
        pa.field("redirects", pa.int32(), nullable=False),
        pa.field("wish", pa.string()),  # an opt-out that a response declared
        pa.field("private", pa.string()),  # addresses that it was requested from and that are not public
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("sha256", pa.binary(32)),
    ]
)
# The columns that the making of shards uses.
USED = ["url", "cause", "detail", "redirects", "wish", "private", "offset", "length", "sha256"]

Asked = dict[str, Any]  # the settings that decide what may be downloaded, by name
Row = dict[str, Any]  # of an index


class BatchRecord(Record):
    batch: str
    attempt: int
    began: str  # a time; in no data object, so that the same responses make the same objects
    asked: Asked
    kept: bool  # False if the run that asked for it is to drop its tar at the end
    tar: DataObject | None  # None if no URL gave bytes
    index: DataObject
    accepted: int
    rejected: dict[str, int]  # cause -> count


class Dropped(Record):
    """Marks that a batch's tar is deleted, or is about to be."""

    batch: str
    attempt: int


class State(NamedTuple):
    """How far the download of a batch is."""

    attempt: int = -1  # the newest that has a record
    dropped: bool = False

    @property
    def is_done(self) -> bool:
        return self.attempt >= 0 and not self.dropped


NOTHING = State()


def batch_key(batch: str, attempt: int) -> str:
    return layout.BATCH.at(batch=batch, attempt=attempt)


def read_batch(store: Store, batch: str, attempt: int) -> BatchRecord:
    return read_record(store, batch_key(batch, attempt), BatchRecord)


def states(store: Store) -> dict[str, State]:
    """The states of all batches in the store, from one listing."""
    newest: dict[str, State] = {}
    for entry in store.list(layout.BATCH.under()):
        dropped = layout.DROPPED.parse(entry.key)
        if parts := dropped or layout.BATCH.parse(entry.key):
            state = State(parts["attempt"], dropped is not None)
            batch = parts["batch"]
            newest[batch] = max(newest.get(batch, state), state)  # of one attempt, dropped is more than done
    return newest


# Which settings decide what

_OPENING = ("allow_private", "allow_networks", "allow_metadata")  # settings that admit more addresses
_HEEDED = ("opt_out", "robots")  # settings that honour the owners' wishes


def asked_with(settings: FetchSettings, max_bytes: int) -> Asked:
    return {"max_bytes": max_bytes, **settings.results()}


def reopened(then: Asked, now: Asked) -> set[Cause]:
    """The causes for which URLs were refused under the settings `then` and may be accepted `now`."""
    another_agent = now["user_agent"] != then["user_agent"]
    differs = {
        Cause.TOO_MANY_BYTES: now["max_bytes"] > then["max_bytes"],
        Cause.TOO_MANY_REDIRECTS: now["redirects"] > then["redirects"],
        Cause.PRIVATE_ADDRESS: any(now.get(name) and now[name] != then.get(name) for name in _OPENING),
        Cause.OPTED_OUT: another_agent or any(then.get(name) and not now.get(name) for name in _HEEDED),
        Cause.HTTP_ERROR: another_agent,
    }
    return {cause for cause, is_reopened in differs.items() if is_reopened}


def either(then: Asked, now: Asked) -> Asked:
    """Settings to record for a batch that was downloaded partly with each: what either reopens, they reopen."""
    least = {name: min(then[name], now[name]) for name in ("max_bytes", "redirects")}
    opened = {name: now[name] if then.get(name) == now[name] else type(now[name])() for name in _OPENING}
    heeded = {name: then.get(name) or now[name] for name in _HEEDED}
    agent = now["user_agent"] if then["user_agent"] == now["user_agent"] else ""
    return {**then, **least, **opened, **heeded, "user_agent": agent}


class Limits:
    """Which downloaded bytes may be used under today's settings. robots.txt is not asked again."""

    def __init__(self, settings: FetchSettings, max_bytes: int) -> None:
        self._settings, self._max_bytes = settings, max_bytes
        self._admits = cache(settings.opened.admits)

    def refused(self, row: Row) -> Rejection | None:
        """Why a URL gives no image; None if its bytes may be used."""
        if row["cause"] is not None:
            return Rejection(Cause(row["cause"]), row["detail"])
        if row["wish"] and self._settings.opt_out:
            return Rejection(Cause.OPTED_OUT, row["wish"])
        if closed := [address for address in (row["private"] or "").split() if not self._admits(address)]:
            return Rejection(Cause.PRIVATE_ADDRESS, closed[0])
        if row["redirects"] > self._settings.redirects:
            return Rejection(Cause.TOO_MANY_REDIRECTS, f"more than {self._settings.redirects}")
        if row["length"] > self._max_bytes:
            return Rejection(Cause.TOO_MANY_BYTES, f"{row['length']} bytes")
        return None


# Downloading


def url_hash(url: str) -> bytes:
    """What URLs are looked up by. Nobody can forge a collision; who uses the bytes compares the URL all the same."""
    return hashlib.sha256(url.encode()).digest()[:16]


def chosen_of(asked: Asked) -> Asked:
    """The settings that differ from their defaults. Batches and lists are named after these."""
    defaults = FetchSettings().results()
    return {name: value for name, value in asked.items() if name not in defaults or value != defaults[name]}


def batch_name(hashes: bytes, asked: Asked, nonce: str = "") -> str:
    """The name of a batch of URLs, in this order, asked for with these settings; `nonce` sets a retry apart."""
    return hashlib.sha256(f"{canonical_json(chosen_of(asked))}\n{nonce}\n".encode() + hashes).hexdigest()[:32]


class Missing(NamedTuple):
    """What a download of a batch is to do."""

    batch: str
    attempt: int
    urls: Sequence[tuple[int, str]]  # to ask for, each after its place in the batch
    rows: Mapping[int, Row]  # place -> a row of the index that stays as it is
    then: Asked | None = None  # the settings of the earlier download


def missing_again(store: Store, batch: str, state: State) -> Missing:
    """What to download of a batch whose tar was dropped: only URLs that had given bytes; failures stay as they are."""
    record = read_batch(store, batch, state.attempt)
    rows = dict(enumerate(read_parquet(store, record.index, None).to_pylist()))
    urls = [(at, row["url"]) for at, row in rows.items() if row["cause"] is None]
    failed = {at: row for at, row in rows.items() if row["cause"] is not None}
    return Missing(batch, state.attempt + 1, urls, failed, record.asked)


def make(store: Store, todo: Missing, settings: FetchSettings, max_bytes: int, *, keep: bool) -> BatchRecord:
    """Download a batch, unless it has a record."""
    key = batch_key(todo.batch, todo.attempt)
    if store.exists(key):
        return read_record(store, key, BatchRecord)
    asked = asked_with(settings, max_bytes)
    if todo.then is not None:  # other lists may use more of the batch than these settings allow
        asked = either(todo.then, asked)
        max_bytes = max(max_bytes, todo.then["max_bytes"])
        settings = settings.model_copy(update={"redirects": max(settings.redirects, todo.then["redirects"])})
    began, rows = datetime.now(UTC).isoformat(timespec="seconds"), dict(todo.rows)
    with store.spool() as file, closing(fetch((url for _, url in todo.urls), settings, max_bytes)) as responses:
        tar = TarWriter(file)
        for response in responses:
            at, url = todo.urls[response.number]
            rows[at] = _row(tar, url, response)
        tar.finish()
        assert len(rows) == len(todo.urls) + len(todo.rows), "a URL was lost or counted twice"
        table = pa.Table.from_pylist([rows[at] for at in sorted(rows)], schema=SCHEMA)
        causes = Counter(row["cause"] for row in rows.values() if row["cause"])
        accepted, where = len(rows) - causes.total(), layout.ORIGINALS.at()
        record = BatchRecord(
            batch=todo.batch,
            attempt=todo.attempt,
            began=began,
            asked=asked,
            kept=keep,
            tar=put_data(store, where, f"{todo.batch}.tar", spool_path(file), tar.sha256) if accepted else None,
            index=put_data(store, where, f"{todo.batch}.parquet", parquet_bytes(table)),
            accepted=accepted,
            rejected=dict(sorted(causes.items())),
        )
    return recorded(store, key, record)


def _row(tar: TarWriter, url: str, response: Fetched) -> Row:
    """The row of the index for a response, whose bytes are added to the tar."""
    data = response.data
    row = {
        "url": url,
        "status": response.status,
        "answered_by": response.url,
        "content_type": response.content_type,
        "tries": response.tries,
        "redirects": response.redirects,
        "wish": response.wish or None,
        "private": response.private or None,
    }
    if isinstance(data, Rejection):
        return row | {"cause": data.cause.value, "detail": data.detail}
    member = tar.add(f"{url_hash(url).hex()}.{SUFFIXES.get(sniff(data) or '', 'bin')}", data)
    sha256 = hashlib.sha256(data).digest()
    return row | {"cause": None, "offset": member.offset, "length": member.length, "sha256": sha256}


# Dropping


def drop(store: Store, batches: Iterable[BatchRecord]) -> None:
    """Delete the tars of batches; their indexes stay, and a record says that the tars are gone."""

    def drop_tar(record: BatchRecord) -> None:
        if record.tar is not None:
            mark_dropped(store, record)
            store.delete(record.tar.key)

    for _ in in_order(drop_tar, batches):
        pass


def mark_dropped(store: Store, record: BatchRecord) -> None:
    key = layout.DROPPED.at(batch=record.batch, attempt=record.attempt)
    write_record(store, key, Dropped(batch=record.batch, attempt=record.attempt))


class Gone(DataError):
    """A batch's record names a tar that is not in the store, and no record says that it was dropped."""


def gone(store: Store, record: BatchRecord) -> Gone:
    """The error for a tar that is missing; marks it as dropped, so that the next run downloads it again."""
    assert record.tar is not None
    mark_dropped(store, record)
    return Gone(
        f"the originals {store.url}/{record.tar.key} are gone", remedy="run again: then they are downloaded once more"
    )


def read_index(store: Store, record: BatchRecord, columns: Sequence[str] = USED) -> pa.Table:
    return read_parquet(store, record.index, columns)


def records(store: Store, batches: Mapping[str, State]) -> Iterator[BatchRecord]:
    """The newest records of these batches, in their order, without those that have none."""
    newest = [(batch, state.attempt) for batch, state in batches.items() if state.attempt >= 0]
    return in_order(lambda pair: read_batch(store, *pair), newest)

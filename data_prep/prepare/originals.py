"""Downloaded originals, kept by their URLs: no table, size or setting asks twice for what is there.

    downloads/batches/<batch>.0.json          BatchRecord: up to 1,024 URLs that were asked for together, written last
    downloads/batches/<batch>.0.dropped.json  its tar is no longer kept
    downloads/batches/<batch>.1.json          it was needed once more, and downloaded once more
    data/originals/<batch>-<sha256>.tar       the bytes, in the order they came: <hash of the URL>.<jpg|png|...>
    data/originals/<batch>-<sha256>.parquet   one row for every URL, in the order in which they were first asked for

A batch is called after its URLs and after what they were asked with, so it has no place of its own among the tables.
Which URLs are there is told by `catalogue`; which of them the rows of a table are made of, by `links`.

What settings of the downloader decide is what is tried (`reopened`) and what is taken of what is there (`Limits`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.images.decode import sniff
from data_prep.rejections import Cause, Rejection
from data_prep.sources.reading import in_order
from data_prep.web.fetch import Fetched, FetchSettings, fetch
from infra import layout
from infra.config import canonical_json
from infra.errors import DataError
from infra.records import DataObject, Record, put_data, read_record, write_record
from infra.shards import TarWriter, parquet_bytes, read_parquet
from infra.store import Store, spool_path

ROWS = 1024  # URLs of a batch: about 256 MiB of photographs from the web
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}

SCHEMA = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False),  # as it was asked for
        pa.field("cause", pa.string()),  # why there is no image; null where there is one
        pa.field("detail", pa.string()),
        pa.field("status", pa.int32()),  # of the last answer
        pa.field("answered_by", pa.string()),  # the URL after redirects
        pa.field("content_type", pa.string()),
        pa.field("tries", pa.int32(), nullable=False),
        pa.field("redirects", pa.int32(), nullable=False),
        pa.field("wish", pa.string()),  # that it be left alone, as an answer said
        pa.field("private", pa.string()),  # addresses that were asked for it and are not public
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("sha256", pa.binary(32)),
    ]
)
USED = ["url", "cause", "detail", "redirects", "wish", "private", "offset", "length", "sha256"]  # where shards are made

Asked = dict[str, Any]  # the settings that decide what may be downloaded, by name
Row = dict[str, Any]  # of an index


class BatchRecord(Record):
    batch: str
    attempt: int
    began: str  # when; it stands here alone, so that the same answers make the same objects
    asked: Asked
    kept: bool  # False if whoever asked for it drops its tar when all is done
    tar: DataObject | None  # None where nothing came
    index: DataObject
    accepted: int
    rejected: dict[str, int]  # cause -> count


class Dropped(Record):
    """That a batch's tar is gone, or is about to go."""

    batch: str
    attempt: int


class State(NamedTuple):
    """How far a batch is."""

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
    """Every batch of which anything is there, from one listing."""
    found: dict[str, State] = {}
    for entry in store.list(layout.BATCH.under()):
        dropped = layout.DROPPED.parse(entry.key)
        if parts := dropped or layout.BATCH.parse(entry.key):
            state = State(parts["attempt"], dropped is not None)
            batch = parts["batch"]
            found[batch] = max(found.get(batch, state), state)  # a drop counts more than what is dropped
    return found


# What settings decide

_OPENING = ("allow_private", "allow_networks", "allow_metadata")
_HEEDED = ("opt_out", "robots")


def asked_with(settings: FetchSettings, max_bytes: int) -> Asked:
    return {"max_bytes": max_bytes, **settings.results()}


def _more(name: str, then: Asked, now: Asked) -> bool:
    return bool(now[name] > then[name])


def _another_agent(then: Asked, now: Asked) -> bool:
    return bool(now["user_agent"] != then["user_agent"])


def _opened(then: Asked, now: Asked) -> bool:
    return any(now.get(name) and now[name] != then.get(name) for name in _OPENING)


def _unheeded(then: Asked, now: Asked) -> bool:
    return any(then.get(name) and not now.get(name) for name in _HEEDED) or _another_agent(then, now)


_REOPENED: dict[Cause, Callable[[Asked, Asked], bool]] = {
    Cause.TOO_MANY_BYTES: partial(_more, "max_bytes"),
    Cause.TOO_MANY_REDIRECTS: partial(_more, "redirects"),
    Cause.PRIVATE_ADDRESS: _opened,
    Cause.OPTED_OUT: _unheeded,
    Cause.HTTP_ERROR: _another_agent,
}


def reopened(then: Asked, now: Asked) -> set[Cause]:
    """The causes for which URLs were refused then and need not be now: those may be asked for again."""
    return {cause for cause, differs in _REOPENED.items() if differs(then, now)}


def either(then: Asked, now: Asked) -> Asked:
    """For URLs some of which were asked for with the one and some with the other: what either reopens, it does."""
    least = {name: min(then[name], now[name]) for name in ("max_bytes", "redirects")}
    opened = {name: now[name] if then.get(name) == now[name] else type(now[name])() for name in _OPENING}
    heeded = {name: then.get(name) or now[name] for name in _HEEDED}
    agent = now["user_agent"] if then["user_agent"] == now["user_agent"] else ""
    return {**then, **least, **opened, **heeded, "user_agent": agent}


class Limits:
    """What is taken of what is there, under the settings of now. What robots.txt says is not asked for once more."""

    def __init__(self, settings: FetchSettings, max_bytes: int) -> None:
        self._settings, self._max_bytes = settings, max_bytes
        self._admits = cache(settings.opened.admits)

    def refused(self, row: Row) -> Rejection | None:
        """Why a URL gives no image; None where its bytes are there and may be used."""
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
    """What a URL is found by. Nobody can make up a URL that has another one's; who uses it compares the URL all the
    same."""
    return hashlib.sha256(url.encode()).digest()[:16]


def chosen_of(asked: Asked) -> Asked:
    """The settings that differ from their defaults. Batches and lists are named after these."""
    defaults = FetchSettings().results()
    return {name: value for name, value in asked.items() if name not in defaults or value != defaults[name]}


def batch_name(hashes: bytes, asked: Asked, nonce: str = "") -> str:
    """Of URLs, in this order, asked for with these settings; a `nonce` tells one more try from the first."""
    return hashlib.sha256(f"{canonical_json(chosen_of(asked))}\n{nonce}\n".encode() + hashes).hexdigest()[:32]


class Missing(NamedTuple):
    """What a batch is made of: URLs to ask for, each with its place in the batch, and rows that stay as they are."""

    batch: str
    attempt: int
    urls: Sequence[tuple[int, str]]
    rows: Mapping[int, Row]
    then: Asked | None = None  # what they were asked for with before


def missing_again(store: Store, batch: str, state: State) -> Missing:
    """Of a batch whose tar was dropped: only what had come is asked for, and a failure stays what it was."""
    record = read_batch(store, batch, state.attempt)
    rows = dict(enumerate(read_parquet(store, record.index, None).to_pylist()))
    urls = [(at, row["url"]) for at, row in rows.items() if row["cause"] is None]
    failed = {at: row for at, row in rows.items() if row["cause"] is not None}
    return Missing(batch, state.attempt + 1, urls, failed, record.asked)


def make(store: Store, todo: Missing, settings: FetchSettings, max_bytes: int, *, keep: bool) -> BatchRecord:
    """Download a batch; done already if it has a record."""
    key = batch_key(todo.batch, todo.attempt)
    if store.exists(key):
        return read_record(store, key, BatchRecord)
    asked = asked_with(settings, max_bytes)
    if todo.then is not None:  # others may use more of it than we do
        asked = either(todo.then, asked)
        max_bytes = max(max_bytes, todo.then["max_bytes"])
        settings = settings.model_copy(update={"redirects": max(settings.redirects, todo.then["redirects"])})
    began, rows = datetime.now(UTC).isoformat(timespec="seconds"), dict(todo.rows)
    with store.spool() as file, closing(fetch((url for _, url in todo.urls), settings, max_bytes)) as answers:
        tar = TarWriter(file)
        for answer in answers:
            at, url = todo.urls[answer.number]
            rows[at] = {"url": url} | _said(answer) | _put(tar, url, answer.data)
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
    return record if write_record(store, key, record) else read_record(store, key, BatchRecord)


def _said(answer: Fetched) -> Row:
    said = {
        "status": answer.status,
        "answered_by": answer.url,
        "content_type": answer.content_type,
        "tries": answer.tries,
        "redirects": answer.redirects,
        "wish": answer.wish or None,
        "private": answer.private or None,
    }
    if isinstance(answer.data, Rejection):
        said |= {"cause": answer.data.cause.value, "detail": answer.data.detail}
    return said


def _put(tar: TarWriter, url: str, data: bytes | Rejection) -> Row:
    if isinstance(data, Rejection):
        return {"cause": data.cause.value}
    member = tar.add(f"{url_hash(url).hex()}.{SUFFIXES.get(sniff(data) or '', 'bin')}", data)
    return {"cause": None, "offset": member.offset, "length": member.length, "sha256": hashlib.sha256(data).digest()}


# Dropping


def drop(store: Store, done: Iterable[BatchRecord]) -> None:
    """Delete the tars; what was answered stays on record, and so does that they are gone."""

    def forget(record: BatchRecord) -> None:
        if record.tar is not None:
            mark_dropped(store, record)
            store.delete(record.tar.key)

    for _ in in_order(forget, done):
        pass


def mark_dropped(store: Store, record: BatchRecord) -> None:
    key = layout.DROPPED.at(batch=record.batch, attempt=record.attempt)
    write_record(store, key, Dropped(batch=record.batch, attempt=record.attempt))


class Gone(DataError):
    """A tar is not there, though its record says so, and nothing says that it was dropped."""


def gone(store: Store, record: BatchRecord) -> Gone:
    """For whoever finds that a tar is not there. From now on all know it, so that it is downloaded once more."""
    assert record.tar is not None
    mark_dropped(store, record)
    return Gone(
        f"the originals {store.url}/{record.tar.key} are gone", remedy="run again: then they are downloaded once more"
    )


def read_index(store: Store, record: BatchRecord, columns: Sequence[str] = USED) -> pa.Table:
    return read_parquet(store, record.index, columns)


def records(store: Store, found: Mapping[str, State]) -> Iterator[BatchRecord]:
    """Those of batches that have one, in their order."""
    there = [(batch, state.attempt) for batch, state in found.items() if state.attempt >= 0]
    return in_order(lambda pair: read_batch(store, *pair), there)

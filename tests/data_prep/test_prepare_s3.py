"""The same prepare on an S3 server as in a folder, also over a bad line: the same shards, and nothing half there.

The server is moto's, or the one that PIXNERD_TEST_S3_ENDPOINT names (`make test-s3`).
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare.job import prepare
from data_prep.prepare.plan import PrepareSettings
from data_prep.rejections import Cause
from data_prep.upkeep.verify import verify
from infra.config import parse
from infra.records import PrepareSummary, ShardRecord
from infra.store import S3Store, Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import contents
from tests.data_prep.test_job import refuse
from tests.data_prep.test_kills import command, descendants, kill, until
from tests.infra.fault_proxy import FaultProxy
from tests.infra.test_store import proxy, s3, s3_settings, unfinished_uploads

__all__ = ["proxy", "s3"]  # fixtures

pytestmark = pytest.mark.usefixtures("ray_cluster")

COUNT = 90
BAD = {3: Cause.TRUNCATED, 5: Cause.MISSING, 7: Cause.NO_CAPTION, 8: Cause.TOO_SMALL}  # by place in every ten rows
PATIENT = {"timeout": 3.0, "backoff": 0.05}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PrepareSettings:
    """Noise in PNGs: the first of two shards needs an upload in parts, the second does not."""
    folder = tmp_path_factory.mktemp("noise")
    rows = []
    for number in range(COUNT):
        bad, name = BAD.get(number % 10), f"{number}.png"
        side = 250 if bad is Cause.TOO_SMALL else 256
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        data = zoo.saved(noise, "PNG", compress_level=1)
        if bad is not Cause.MISSING:
            (folder / name).write_bytes(data[:-100] if bad is Cause.TRUNCATED else data)
        rows.append({"image": name, "caption": None if bad is Cause.NO_CAPTION else f"noise {number}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    source = {"kind": "table_folder", "name": "noise", "url": str(folder), "tables": ["table.parquet"]}
    return parse(PrepareSettings, {"sources": [source], "sizes": [256, 16], "format": "png", "rows_per_shard": 70})


@pytest.fixture(scope="module")
def in_a_folder(settings: PrepareSettings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = open_store(str(tmp_path_factory.mktemp("folder")))
    prepare(store, settings)
    return contents(store)


@pytest.fixture
def keys(s3: str, tmp_path: Path) -> dict[str, str]:
    """Credentials in files: Ray's workers may have been started before the environment held any."""
    found = {}
    for setting, name in (("access_key", "AWS_ACCESS_KEY_ID"), ("secret_key", "AWS_SECRET_ACCESS_KEY")):
        (tmp_path / setting).write_text(os.environ[name])
        found[setting] = f"file:{tmp_path / setting}"
    return found


@pytest.fixture
def place() -> str:
    return f"s3://pixnerd-test/{uuid.uuid4().hex}/corpus"


def opened(place: str, endpoint: str, keys: dict[str, str], **more: Any) -> S3Store:
    store = open_store(place, s3_settings(endpoint, **keys, **more))
    assert isinstance(store, S3Store)
    return store


def assert_as_in_a_folder(store: Store, summary: PrepareSummary, expected: dict[str, bytes]) -> None:
    found = contents(store)
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert summary.inputs == COUNT
    for size, causes in (("256", set(BAD.values())), ("16", set(BAD.values()) - {Cause.TOO_SMALL})):
        assert summary.sizes[size].rejected == dict.fromkeys(sorted(causes), COUNT // 10)
        assert summary.sizes[size].accepted == COUNT - len(causes) * COUNT // 10
    assert verify(store, summary.plan, summary.edition).problems == []


@contextmanager
def watched(store: Store) -> Iterator[list[str]]:
    """Looks, for as long as it lasts and once after it, at all that a reader sees; what is wrong with it is listed."""
    wrong: list[str] = []
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        for entry in store.list():
            if entry.key not in seen:
                seen.add(entry.key)
                wrong.extend(_wrong(store, entry.key))

    def go_on() -> None:
        while not over.wait(0.02):
            look()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join()
        look()
        assert seen, "there was nothing to see"


def _wrong(store: Store, key: str) -> Iterator[str]:
    data = store.get(key)
    if key.startswith("data/"):
        if hashlib.sha256(data).hexdigest() not in key:
            yield f"{key} is not what its name says"
    elif key.startswith("shards/"):
        record = ShardRecord.model_validate_json(data)
        for named in filter(None, (record.tar, record.index)):
            if store.size(named.key) != named.size:
                yield f"{key} names {named.key}, which is not whole"
    elif key.endswith(".parquet"):
        pq.read_table(pa.BufferReader(data))
    else:
        json.loads(data)


def test_the_same_shards_as_in_a_folder(
    s3: str,
    place: str,
    keys: dict[str, str],
    settings: PrepareSettings,
    in_a_folder: dict[str, bytes],
) -> None:
    store = opened(place, f"http://{s3}", keys)
    with watched(store) as wrong:
        summary = prepare(store, settings)
    assert wrong == []
    assert_as_in_a_folder(store, summary, in_a_folder)
    assert prepare(store, settings, decoder=refuse) == summary
    assert unfinished_uploads(store) == []


# Each with where it is met; the texts are of the keys, or of the requests for uploads in parts.
FAULTS: list[tuple[Any, str, str]] = [
    ((500, "InternalError"), "PUT", "/plans/"),
    ("lost answer", "PUT", "/plans/"),
    ("torn upload", "PUT", "/plans/"),
    ((503, "SlowDown"), "GET", "/plans/"),
    ((500, "InternalError"), "GET", "list-type"),
    ("torn download", "GET", "list-type"),
    ("hang", "HEAD", "/data/256/"),
    ((500, "InternalError"), "POST", "uploads"),
    ((500, "InternalError"), "PUT", "partNumber=1"),
    ("torn upload", "PUT", "partNumber=1"),
    ("slow upload", "PUT", "partNumber=1"),
    ("hang", "PUT", "partNumber=2"),
    ("torn upload", "PUT", "partNumber=2"),
    ("lost answer", "POST", "uploadId"),
    ("torn upload", "PUT", "/data/16/"),
    ("slow upload", "PUT", "/data/16/"),
    ("drop", "PUT", "/data/16/"),
    ((500, "InternalError"), "PUT", "/shards/"),
    ("torn upload", "PUT", "/shards/"),
    ("slow upload", "PUT", "/shards/"),
    ("lost answer", "PUT", "/shards/"),
    ("hang", "PUT", "/shards/"),
    ((500, "InternalError"), "PUT", "/prepared/"),
    ("lost answer", "PUT", "/prepared/"),
    ("torn upload", "PUT", "/prepared/"),
]


def test_over_a_bad_line_the_same_shards_and_nothing_half_there(
    s3: str,
    proxy: FaultProxy,
    place: str,
    keys: dict[str, str],
    settings: PrepareSettings,
    in_a_folder: dict[str, bytes],
) -> None:
    for fault, method, text in FAULTS:
        proxy.spoil(fault, method, text)
    plain = opened(place, f"http://{s3}", keys)
    with watched(plain) as wrong:
        summary = prepare(opened(place, proxy.url, keys, **PATIENT), settings)
    assert proxy.unused() == 0
    assert wrong == []
    assert_as_in_a_folder(plain, summary, in_a_folder)
    assert unfinished_uploads(plain) == []


def test_a_worker_killed_in_the_middle_of_an_upload_leaves_nothing_to_see(
    s3: str,
    proxy: FaultProxy,
    place: str,
    keys: dict[str, str],
    settings: PrepareSettings,
    in_a_folder: dict[str, bytes],
) -> None:
    proxy.spoil("hang", "PUT", "partNumber=2")
    plain = opened(place, f"http://{s3}", keys)
    killed: list[int] = []

    def kill_worker() -> None:
        until(lambda: any("partNumber=2" in request for request in proxy.requests), "the upload")
        killed.extend(pid for pid in descendants(os.getpid()) if command(pid).startswith(b"ray::_make"))
        for pid in killed:
            kill(pid)

    killer = threading.Thread(target=kill_worker)
    killer.start()
    with watched(plain) as wrong:
        summary = prepare(opened(place, proxy.url, keys, timeout=60.0), settings)
    killer.join()
    assert killed
    assert wrong == []
    assert_as_in_a_folder(plain, summary, in_a_folder)

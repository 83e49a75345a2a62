"""One behaviour over file:// and s3://, and what each does when its world goes wrong.

s3:// runs against moto's HTTP server, or against the server that PIXNERD_TEST_S3_ENDPOINT names.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from infra import notices, outage
from infra.config import digest
from infra.errors import NotFound, SettingsError, StoreError, StoreUnreachable, UnsafeStore
from infra.store import Entry, FileStore, S3Store, Store, StoreSettings, file, open_store, spool_path
from tests.infra.faked_time import faked_time
from tests.infra.fault_proxy import Fault, FaultProxy

MIB = 1 << 20
SECRET = "keep-this-to-yourself"
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """host:port of an S3 server that has a bucket called `pixnerd-test`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        server = None
        endpoint = os.environ.get("PIXNERD_TEST_S3_ENDPOINT")
        if endpoint is None:
            from moto.server import ThreadedMotoServer

            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
            server.start()
            endpoint = "http://{}:{}".format(*server.get_host_and_port())
        try:
            client(endpoint).create_bucket(Bucket="pixnerd-test")
            yield endpoint.removeprefix("http://")
        finally:
            if server is not None:
                server.stop()


def client(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")


def s3_settings(endpoint: str, **more: Any) -> StoreSettings:
    few = {"backoff": 0.01, "patience": 20.0, "multipart_threshold": 6 * MIB, "part_size": 5 * MIB}
    return StoreSettings.model_validate({"endpoint_url": endpoint, **few, **more})


def s3_store(endpoint: str, **more: Any) -> S3Store:
    store = open_store(f"s3://pixnerd-test/{uuid.uuid4().hex}/below", s3_settings(endpoint, **more))
    assert isinstance(store, S3Store)
    return store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(str(tmp_path / "store"))
    return s3_store(f"http://{request.getfixturevalue('s3')}")


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3) as proxy:
        yield proxy


@pytest.fixture
def faulty(proxy: FaultProxy) -> S3Store:
    """A store whose requests pass through `proxy`."""
    return s3_store(proxy.url, timeout=20)


def unfinished_uploads(store: S3Store) -> list[Any]:
    found = store._s3().list_multipart_uploads(Bucket=store.bucket, Prefix=store.base)
    return list(found.get("Uploads", ()))


# -- one behaviour ---------------------------------------------------------------------------------------------------


def test_what_is_absent(store: Store, tmp_path: Path) -> None:
    assert store.size("a/b") is None
    assert not store.exists("a/b")
    assert list(store.list()) == []
    store.delete("a/b")
    for start, end in ((0, None), (0, 5), (3, 3), (7, None)):
        with pytest.raises(NotFound, match="a/b"):
            store.get("a/b", start, end)
    with pytest.raises(NotFound):
        store.download("a/b", tmp_path / "here" / "b")
    assert list((tmp_path / "here").iterdir()) == []


def test_put_writes_over_and_create_does_not(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    assert store.create("a/b", b"first") is True
    assert store.create("a/b", b"second") is False
    assert store.create("a/b", source) is False
    assert store.get("a/b") == b"first"
    store.put("a/b", source)
    assert store.get("a/b") == b"from a file"
    store.put("a/b", b"")
    assert (store.get("a/b"), store.size("a/b"), store.exists("a/b")) == (b"", 0, True)
    store.delete("a/b")
    assert not store.exists("a/b")
    assert store.create("a/b", source) is True


def test_a_folder_is_no_object(store: Store) -> None:
    store.put("a/b", b"1")
    assert store.size("a") is None
    with pytest.raises(NotFound):
        store.get("a")
    with pytest.raises(NotFound):
        store.get("a/b/c")
    store.delete("a/b/c")
    assert list(store.list("a/b/c/")) == []


@st.composite
def ranges(draw: st.DrawFn) -> tuple[bytes, int, int | None]:
    data = draw(st.binary(max_size=40))
    start = draw(st.integers(0, len(data) + 3))
    return data, start, draw(st.none() | st.integers(start, start + 20) | st.just(1 << 50))


@quick
@given(ranges())
@example((b"0123456789", 2, 3))
@example((b"0123456789", 0, 9))
@example((b"", 0, 1))
def test_ranges_are_slices(store: Store, ranged: tuple[bytes, int, int | None]) -> None:
    data, start, end = ranged
    store.put("ranged", data)
    assert store.get("ranged", start, end) == data[start:end]


def test_a_backward_range_is_a_mistake(store: Store) -> None:
    for start, end in ((-1, None), (5, 4)):
        with pytest.raises(ValueError, match="range"):
            store.get("a", start, end)


part = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), min_size=1, max_size=12).filter(
    lambda text: "/" not in text and text not in (".", "..") and len(text.encode()) < 100
)


@quick
@given(keys=st.sets(st.lists(part, min_size=1, max_size=3).map("/".join), max_size=6), cut=st.integers(0, 40))
def test_any_key_comes_back_in_byte_order(store: Store, keys: set[str], cut: int) -> None:
    assume(not any(other.startswith(f"{key}/") for key in keys for other in keys))
    here = uuid.uuid4().hex
    full = sorted((f"{here}/{key}" for key in keys), key=str.encode)
    for number, key in enumerate(full):
        assert store.create(key, b"x" * number)
    assert list(store.list(f"{here}/")) == [Entry(key, number) for number, key in enumerate(full)]
    assert [store.get(key) for key in full] == [b"x" * number for number in range(len(full))]
    if full:
        prefix = full[-1][: len(here) + 1 + cut]
        assert [entry.key for entry in store.list(prefix)] == [key for key in full if key.startswith(prefix)]
    for key in full:
        store.delete(key)
    assert list(store.list(f"{here}/")) == []


def test_folders_sort_among_files_as_their_keys_do(store: Store) -> None:
    keys = ["a-", "a/b", "a0", "a/b-c/d", "a/b.c", "b", "é", "\U0001f600", "\ufb01"]
    for key in keys:
        store.put(key, b"")
    assert [entry.key for entry in store.list()] == sorted(keys, key=str.encode)
    assert [entry.key for entry in store.list("a/b")] == ["a/b", "a/b-c/d", "a/b.c"]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\0b", "a\nb", "\udc80", "x" * 256])
def test_bad_keys_are_refused_by_everything(store: Store, tmp_path: Path, key: str) -> None:
    for refused in (
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.create(key, b""),
        lambda: store.size(key),
        lambda: store.delete(key),
        lambda: store.download(key, tmp_path / "x"),
    ):
        with pytest.raises(StoreError, match="the key"):
            refused()
    assert list(store.list()) == []


def test_of_many_creators_one_wins(store: Store) -> None:
    count = 16
    start = threading.Barrier(count)
    copies = [pickle.loads(pickle.dumps(store)) for _ in range(4)] * (count // 4)

    def race(number: int) -> bool:
        start.wait()
        return bool(copies[number].create("lease", str(number).encode()))

    with ThreadPoolExecutor(count) as pool:
        won = [number for number, first in enumerate(pool.map(race, range(count))) if first]
    assert len(won) == 1
    assert store.get("lease") == str(won[0]).encode()


def test_large_objects_from_bytes_and_files(store: Store, tmp_path: Path) -> None:
    big = os.urandom(11 * MIB + 7)
    source, target = tmp_path / "source", tmp_path / "made" / "target"
    source.write_bytes(big)
    assert store.create("big", source) is True
    assert store.create("big", big[::-1]) is False
    store.put("again", big)
    for key in ("big", "again"):
        assert store.size(key) == len(big)
        assert store.get(key, 5 * MIB - 3, 5 * MIB + 3) == big[5 * MIB - 3 : 5 * MIB + 3]
        store.download(key, target)
        assert target.read_bytes() == big
        assert list(target.parent.iterdir()) == [target]
    if isinstance(store, S3Store):
        assert "-3" in store._s3().head_object(Bucket=store.bucket, Key=store.base + "big")["ETag"]  # three parts
        assert unfinished_uploads(store) == []


def test_download_replaces_what_was_there(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"something longer than the object")
    store.put("a", b"short")
    with target.open("rb") as reader:
        store.download("a", target)
        assert reader.read() == b"something longer than the object"  # whoever reads it is not disturbed
    assert target.read_bytes() == b"short"
    store.put("a", b"")
    store.download("a", target)
    assert target.read_bytes() == b""


def test_a_missing_source_is_not_a_missing_object(store: Store, tmp_path: Path) -> None:
    for write in (store.put, store.create):
        with pytest.raises(FileNotFoundError):
            write("a", tmp_path / "nowhere")
    assert list(store.list()) == []


@pytest.mark.parametrize("how", ["put", "create"])
def test_a_spool_becomes_an_object(store: Store, how: str) -> None:
    with store.spool() as spool:
        spool.write(b"spooled" * 1000)
        getattr(store, how)("a/b", spool_path(spool))
    assert store.get("a/b") == b"spooled" * 1000
    with store.spool() as spool:
        spool.write(b"left where it is")
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_a_spool_on_the_stores_own_disk_is_not_copied(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    with store.spool() as spool:
        spool.write(b"spooled")
        store.put("a/b", spool_path(spool))
        assert os.fstat(spool.fileno()).st_ino == (store.root / "a/b").stat().st_ino
    store.put("a/c", b"bytes")
    assert (store.root / "a/b").stat().st_mode == (store.root / "a/c").stat().st_mode
    assert not list((store.root / ".tmp").iterdir())


def test_a_file_with_a_name_is_always_copied(tmp_path: Path) -> None:
    store, mine = FileStore(tmp_path / "store"), tmp_path / "mine"
    mine.write_bytes(b"before")
    store.put("a/b", mine)
    mine.write_bytes(b"after, in the same file")
    assert store.get("a/b") == b"before"


def test_a_spool_of_another_disk_is_copied(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    with tempfile.TemporaryFile(dir="/dev/shm") as spool:
        if os.fstat(spool.fileno()).st_dev == tmp_path.stat().st_dev:
            pytest.skip("one disk holds both")
        spool.write(b"from afar")
        store.put("a/b", spool_path(spool))
    assert store.get("a/b") == b"from afar"


def test_what_is_scratch_is_not_listed(store: Store) -> None:
    store.put(".tmp/half", b"1")
    store.put("a/.tmp/b", b"1")
    assert [entry.key for entry in store.list()] == ["a/.tmp/b"]
    assert list(store.list(".tmp")) == []


def test_probe_passes_and_leaves_nothing(store: Store) -> None:
    store.probe()
    assert list(store.list()) == []
    if isinstance(store, S3Store):
        assert store._s3().list_objects_v2(Bucket=store.bucket, Prefix=store.base)["KeyCount"] == 0


def test_stores_travel_to_other_processes(store: Store) -> None:
    store.put("a", b"1")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get('a'))"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True)
    assert done.stdout.strip() == b"b'1'"


# -- URLs and settings -----------------------------------------------------------------------------------------------


def test_urls(tmp_path: Path) -> None:
    folder = tmp_path / "with space %41é"
    for url in (str(folder), folder.as_uri(), f"file://{str(folder).replace('%', '%25')}"):
        store = open_store(url)
        store.put("a", b"1")
        assert open_store(store.url).get("a") == (folder / "a").read_bytes() == b"1"
    assert open_store("s3://some.bucket").url == "s3://some.bucket"
    assert open_store("s3://some.bucket/a/b/").url == "s3://some.bucket/a/b"


@pytest.mark.parametrize(
    "url",
    ["", "gs://bucket/x", "file:x", "file:/x", "file://host/x", "file://", "s3:x", "s3://", "s3:///x", "s3://b/../c"],
)
def test_wrong_urls_name_the_right_ones(url: str) -> None:
    with pytest.raises(SettingsError, match=r"file://|s3://bucket"):
        open_store(url)


def test_credentials_in_the_wrong_place_are_refused_and_not_repeated() -> None:
    for wrong in (
        lambda: open_store(f"s3://key:{SECRET}@host/bucket"),
        lambda: StoreSettings(endpoint_url=f"http://key:{SECRET}@host"),
        lambda: StoreSettings.model_validate({"access_key": SECRET, "secret_key": SECRET}),
        lambda: StoreSettings.model_validate({"access_key": f"env:{SECRET}"}),
    ):
        with pytest.raises((SettingsError, ValueError)) as caught:
            wrong()
        assert SECRET not in f"{caught.value}{caught.value!r}"


def test_how_a_store_is_reached_does_not_change_results() -> None:
    other = StoreSettings.model_validate({"endpoint_url": "http://a", "patience": 1.0, "path_style": True})
    assert digest(other) == digest(StoreSettings())


def test_keys_from_settings_are_used_and_never_shown(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", os.environ["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("MY_SECRET", os.environ["AWS_SECRET_ACCESS_KEY"])
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = s3_store(proxy.url, access_key="env:MY_KEY", secret_key="env:MY_SECRET")
    with caplog.at_level(logging.DEBUG, "infra"):
        store.put("a", b"1")
        proxy.spoil((503, "SlowDown"), "GET")
        assert store.get("a") == b"1"
        proxy.spoil((403, "SignatureDoesNotMatch"), "GET")
        with pytest.raises(StoreUnreachable, match="credentials") as caught:
            store.get("a")
    assert "SlowDown" in caplog.text
    for shown in (caplog.text, f"{caught.value!r}", f"{store!r}{store.settings!r}", repr(pickle.dumps(store))):
        assert secret not in shown
    monkeypatch.delenv("MY_SECRET")
    with pytest.raises(SettingsError, match="MY_SECRET"):
        pickle.loads(pickle.dumps(store)).get("a")


# -- a folder --------------------------------------------------------------------------------------------------------


def test_symbolic_links_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store = FileStore(tmp_path / "store")
    store.put("real", b"")
    (store.root / "folder").symlink_to(outside)
    (store.root / "file").symlink_to(outside / "secret")
    (store.root / "loop").symlink_to(store.root / "loop")
    assert [entry.key for entry in store.list()] == ["real"]
    for key in ("folder/secret", "file", "loop", "loop/a"):
        with pytest.raises(StoreError, match="symbolic link"):
            store.get(key)
        with pytest.raises(StoreError, match="symbolic link"):
            store.put(key, b"overwritten")
    with pytest.raises(StoreError, match="symbolic link"):
        list(store.list("folder/"))
    assert (outside / "secret").read_bytes() == b"secret"


@pytest.mark.parametrize("verb", ["put", "create"])
def test_a_writer_killed_in_the_middle_leaves_nothing_visible(tmp_path: Path, verb: str) -> None:
    store = FileStore(tmp_path / "store")
    if verb == "put":
        store.put("a/b", b"old")
    before = list(store.list())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys; from pathlib import Path; from infra.store import open_store; "
    code += "getattr(open_store(sys.argv[1]), sys.argv[2])('a/b', Path(sys.argv[3]))"
    writer = subprocess.Popen([sys.executable, "-c", code, store.url, verb, str(pipe)])
    with pipe.open("wb", buffering=0) as feed:
        for _ in range(4):  # when the last megabyte is in the pipe, the first one is in the writer's file
            assert feed.write(b"x" * MIB) == MIB
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
    (scratch,) = (store.root / ".tmp").iterdir()
    assert scratch.stat().st_size >= MIB
    assert list(store.list()) == before
    assert (store.get("a/b") if before else store.size("a/b")) == (b"old" if before else None)
    assert store.create("a/b", b"new") is not bool(before)


def test_probe_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.probe()
    old, young = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * file.STALE_SECONDS,) * 2)
    store.probe()
    assert (old.exists(), young.exists()) == (False, True)


def test_probe_leaves_a_live_writers_file_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    days_ahead = time.time() + 2 * file.STALE_SECONDS
    seen = []

    def replace(source: Path, target: Path) -> None:
        """In the middle of a write, others probe: one whose clock is wrong, and one that finds the file old."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: days_ahead)
            FileStore(tmp_path).probe()
        os.utime(source, (time.time() - 2 * file.STALE_SECONDS,) * 2)
        FileStore(tmp_path).probe()
        seen.append(source)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    store.put("key", b"data")
    with store.spool() as spool:
        spool.write(b"large")
        store.put("large", spool_path(spool))
    assert (store.get("key"), store.get("large"), len(seen)) == (b"data", b"large", 2)


def test_now_is_the_stores_own_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", b"data")
    modified = next(iter(store.list())).modified
    if isinstance(store, FileStore):  # the server of the other one runs in this process
        monkeypatch.setattr(time, "time", lambda: 1e10)
    assert abs(store.now() - modified) < 600


def test_on_disk_a_key_is_an_object_or_a_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a/b", b"1")
    for write in (store.put, store.create):
        for key in ("a", "a/b/c"):
            with pytest.raises(StoreError, match="folder at once"):
                write(key, b"2")
    assert list(store.list()) == [Entry("a/b", 1)]
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_link_whose_answer_was_lost_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)  # what NFS says to the repeated call

    store = FileStore(tmp_path)
    monkeypatch.setattr(os, "link", lost)
    assert store.create("a", b"1") is True


class Away:
    """A server of files that is away for a while: the named call of `os` fails, after it was made or before."""

    def __init__(self, patch: pytest.MonkeyPatch, call: str, *, times: int = 3, made: bool = False) -> None:
        self.real, self.left, self.made = getattr(os, call), times, made
        patch.setattr(os, call, self)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if self.left and "/store" in str(given):
            self.left -= 1
            if self.made:
                self.real(*given, **named)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self.real(*given, **named)


@pytest.mark.parametrize("made", [False, True], ids=["not made", "answer lost"])
@pytest.mark.parametrize(("verb", "call"), [("put", "replace"), ("create", "link"), ("put", "mkdir")])
def test_a_folder_of_another_machine_may_be_away_for_a_while(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    verb: str,
    call: str,
    made: bool,
) -> None:
    clock, store = faked_time(monkeypatch), FileStore(tmp_path / "store")
    away = Away(monkeypatch, call, times=8 if not made else 1, made=made and call != "mkdir")
    with caplog.at_level(logging.WARNING):
        assert getattr(store, verb)("a/b", b"1") in (None, True)
    assert (away.left, store.get("a/b")) == (0, b"1")
    assert not list((store.root / ".tmp").iterdir())
    assert (len(caplog.records), "Stale file handle" in caplog.text) == ((0, False) if made else (1, True))
    assert clock.slept


def test_reading_waits_for_a_folder_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked_time(monkeypatch)
    store = FileStore(tmp_path / "store")
    store.put("a/b", b"1")
    with monkeypatch.context() as patch:
        away = [Away(patch, call) for call in ("scandir", "stat", "unlink")]
        assert [entry.key for entry in store.list()] == ["a/b"]
        assert store.size("a/b") == 1
        store.download("a/b", tmp_path / "copy")
        store.delete("a/b")
        assert [one.left for one in away] == [0, 0, 0]
    assert list(store.list()) == []


def test_a_folder_that_stays_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = faked_time(monkeypatch), FileStore(tmp_path / "store")
    Away(monkeypatch, "link", times=1000)
    with pytest.raises(StoreError, match=r"Stale file handle.*mounted from"):
        store.create("a", b"1")
    assert sum(clock.slept) == pytest.approx(store.patience)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreUnreachable, match="written"):
        FileStore(tmp_path).put("a", b"1")
    tmp_path.chmod(0o700)


def test_a_name_that_is_no_key_is_reported(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")).touch()
    with pytest.raises(StoreError, match="not Unicode"):
        list(store.list())


# -- a server --------------------------------------------------------------------------------------------------------


def test_lists_are_read_page_by_page(s3: str) -> None:
    store = s3_store(f"http://{s3}", page_size=7)
    keys = [f"part-{number:03d}" for number in range(30)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"1"), keys))
    store._s3().put_object(Bucket=store.bucket, Key=f"{store.base}folder/")  # as browsers of buckets make them
    pages = []
    store._s3().meta.events.register("before-call.s3.ListObjectsV2", lambda **_: pages.append(1))
    assert [entry.key for entry in store.list()] == keys
    assert len(pages) == 5
    assert [entry.key for entry in store.list("part-01")] == keys[10:20]


PASSING = [(500, "InternalError"), (503, "SlowDown"), (502, ""), (504, ""), (429, ""), (400, "RequestTimeout"), "drop"]


@pytest.mark.parametrize("faults", [PASSING, ["hang"]], ids=["answers", "silence"])
def test_what_passes_by_itself_is_tried_again(proxy: FaultProxy, tmp_path: Path, faults: list[Any]) -> None:
    store = s3_store(proxy.url, timeout=0.5, backoff=0.001)

    def spoil(method: str, text: str = "") -> None:
        for fault in faults:
            if (method, fault) != ("HEAD", (400, "RequestTimeout")):  # an answer to HEAD has no room for the code
                proxy.spoil(fault, method, text)

    spoil("PUT")
    assert store.create("a", b"123") is True
    spoil("HEAD")
    assert store.size("a") == 3
    spoil("GET")
    assert store.get("a", 1, 2) == b"2"
    spoil("GET")
    store.download("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"123"
    spoil("GET", "list-type")
    assert list(store.list()) == [Entry("a", 3)]
    spoil("DELETE")
    store.delete("a")
    assert not store.exists("a")
    assert proxy.unused() == 0


def test_torn_downloads_are_tried_again(faulty: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
    big = os.urandom(11 * MIB)
    faulty.put("big", big)
    proxy.spoil("torn download", "GET", times=2)
    assert faulty.get("big") == big
    proxy.spoil("torn download", "GET", times=3)
    faulty.download("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == big
    proxy.spoil("torn download", "GET", "list-type")
    assert list(faulty.list()) == [Entry("big", len(big))]
    assert proxy.unused() == 0


def test_torn_uploads_are_tried_again(faulty: S3Store, proxy: FaultProxy) -> None:
    small, big = os.urandom(MIB), os.urandom(11 * MIB)
    proxy.spoil("torn upload", "PUT", times=2)
    assert faulty.create("small", small) is True
    proxy.spoil("torn upload", "PUT", "partNumber=2", times=2)
    proxy.spoil((500, "InternalError"), "POST", "uploads")
    proxy.spoil((503, "SlowDown"), "POST", "uploadId")
    assert faulty.create("big", big) is True
    assert (faulty.get("small"), faulty.get("big")) == (small, big)
    assert proxy.unused() == 0
    assert unfinished_uploads(faulty) == []


@pytest.mark.parametrize("size", [3, 7 * MIB])
def test_whose_answer_was_lost_still_won(faulty: S3Store, proxy: FaultProxy, size: int) -> None:
    method, text = ("PUT", "") if size < MIB else ("POST", "uploadId")
    for write in (faulty.create, faulty.put):
        proxy.spoil("lost answer", method, text)
        assert write(write.__name__, bytes(size)) in (True, None)
        assert faulty.size(write.__name__) == size
    assert proxy.unused() == 0
    assert faulty.create("create", bytes(size)) is False


@pytest.mark.parametrize("second", [(404, "NoSuchUpload"), (412, "PreconditionFailed")])
def test_what_a_repeated_completion_meets(faulty: S3Store, proxy: FaultProxy, second: tuple[int, str]) -> None:
    proxy.spoil("lost answer", "POST", "uploadId")
    proxy.spoil(second, "POST", "uploadId")
    assert faulty.create("big", bytes(7 * MIB)) is True
    assert proxy.unused() == 0


def test_an_upload_that_somebody_aborted(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.spoil((404, "NoSuchUpload"), "POST", "uploadId")
    with pytest.raises(StoreError, match="NoSuchUpload") as caught:
        faulty.put("big", bytes(7 * MIB))
    assert not isinstance(caught.value, NotFound)


def test_an_object_replaced_while_it_is_read_is_not_mixed(faulty: S3Store, tmp_path: Path) -> None:
    faulty.put("big", bytes(11 * MIB))
    parts = []

    def replace(**_: Any) -> None:
        parts.append(1)
        if len(parts) == 2:
            faulty.put("big", b"1" * (11 * MIB))

    faulty._s3().meta.events.register("before-call.s3.GetObject", replace)
    with pytest.raises(StoreError, match="replaced"):
        faulty.download("big", tmp_path / "here" / "big")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_conflict_starts_the_write_again(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.spoil((409, "ConditionalRequestConflict"), "PUT")
    assert faulty.create("small", b"1") is True
    proxy.spoil((409, "ConditionalRequestConflict"), "POST", "uploadId")
    assert faulty.create("big", bytes(7 * MIB)) is True
    assert faulty.size("big") == 7 * MIB
    assert sum(request.startswith("POST") and "uploads" in request for request in proxy.requests) == 2
    assert unfinished_uploads(faulty) == []


@pytest.mark.parametrize("honoured", [True, False], ids=["honours the condition", "ignores it"])
def test_somebody_finishes_the_same_large_object_first(faulty: S3Store, s3: str, honoured: bool) -> None:
    other = S3Store(faulty.url.removeprefix("s3://"), s3_settings(f"http://{s3}"))
    raced, once = [], threading.Lock()

    def race(**_: Any) -> None:
        if once.acquire(blocking=False):
            raced.append(other.create("big", b"first"))

    events = faulty._s3().meta.events
    events.register("before-call.s3.UploadPart", race)
    if not honoured:
        events.register(
            "before-call.s3.CompleteMultipartUpload", lambda params, **_: params["headers"].pop("If-None-Match")
        )
    assert faulty.create("big", bytes(7 * MIB)) is False
    assert raced == [True]
    assert faulty.get("big") == b"first"
    assert unfinished_uploads(faulty) == []


def test_a_failed_upload_is_aborted(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.spoil((403, "AccessDenied"), "PUT", "partNumber=2")
    with pytest.raises(StoreUnreachable, match="AccessDenied"):
        faulty.create("big", bytes(11 * MIB))
    assert not faulty.exists("big")
    assert unfinished_uploads(faulty) == []


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ((403, "InvalidAccessKeyId"), StoreUnreachable, "access_key"),
        ((403, "RequestTimeTooSkewed"), StoreUnreachable, "clock"),
        ((404, "NoSuchBucket"), StoreUnreachable, "no bucket"),
        ((404, "NoSuchKey"), NotFound, "no object"),
        ((301, "PermanentRedirect"), StoreUnreachable, "region"),
        ((501, "NotImplemented"), StoreError, "NotImplemented"),
    ],
)
def test_what_stays_wrong_is_said_at_once(
    faulty: S3Store, proxy: FaultProxy, fault: tuple[int, str], error: type[StoreError], says: str
) -> None:
    proxy.spoil(fault, "GET", times=9)
    with pytest.raises(error, match=says) as caught:
        faulty.get("a")
    assert type(caught.value) is error
    if fault[0] != 301:  # boto asks for the bucket's region itself
        assert len(proxy.requests) == 1


def test_patience_ends(faulty: S3Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = faked_time(monkeypatch)
    proxy.away = (503, "SlowDown")
    with pytest.raises(StoreError, match="503 SlowDown"):
        faulty.get("a")
    assert sum(clock.slept) == pytest.approx(faulty.settings.patience)


@pytest.mark.parametrize("fault", [(503, "SlowDown"), "drop"], ids=str)
def test_an_outage_is_ridden_out_by_single_calls_of_many_threads_and_told_once(
    faulty: S3Store, proxy: FaultProxy, fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "TOLD_AFTER", 0.1)
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(notices, "_last", {})
    before = [f"before/{number}" for number in range(8)]
    for key in before:
        faulty.put(key, key.encode())
    proxy.requests.clear()
    proxy.away = fault
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(16) as pool:
        read = [pool.submit(faulty.get, key) for key in before]
        made = [pool.submit(faulty.create, f"after/{number}", b"1") for number in range(8)]
        while len(proxy.requests) < 16 * 5:  # each has failed again and again
            time.sleep(0.01)
        proxy.away = None
        assert [one.result() for one in read] == [key.encode() for key in before]
        assert [one.result() for one in made] == [True] * 8
    told = [record.message for record in caplog.records]
    assert len(told) == 1, told
    assert told[0].startswith(f"{faulty.url} is out of order (")


@pytest.mark.slow
def test_a_whole_minute_is_ridden_out_as_the_settings_are(s3: str) -> None:
    with FaultProxy(s3) as closing, FaultProxy(s3) as silent, ThreadPoolExecutor(32) as pool:
        place = f"s3://pixnerd-test/{uuid.uuid4().hex}"
        stores = [open_store(place, StoreSettings(endpoint_url=proxy.url)) for proxy in (closing, silent)]
        stores[0].put("a", b"1")
        closing.away, silent.away = "drop", "hang"
        read = [pool.submit(store.get, "a") for store in stores for _ in range(16)]
        time.sleep(60.0)
        closing.away = silent.away = None
        silent.released.set()
        assert [one.result() for one in read] == [b"1"] * 32


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    clock = faked_time(monkeypatch)
    store = open_store("s3://bucket", StoreSettings(endpoint_url="http://127.0.0.1:1"))
    with pytest.raises(StoreUnreachable, match=r"127\.0\.0\.1:1 \(EndpointConnectionError\).*endpoint_url"):
        store.probe()
    assert 0 < sum(clock.slept) < 3  # a person waits


def test_nobody_said_who_we_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreUnreachable, match=r"NoCredentialsError.*credentials"):
        open_store("s3://bucket", StoreSettings(endpoint_url="http://127.0.0.1:1")).get("a")


def test_a_missing_bucket_is_found_by_the_probe(s3: str) -> None:
    with pytest.raises(StoreUnreachable, match="no bucket"):
        open_store("s3://pixnerd-missing/x", s3_settings(f"http://{s3}")).probe()


class Careless(BaseHTTPRequestHandler):
    """An S3 server that ignores conditions and ranges, as some do."""

    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_GET(self) -> None:
        self._answer(200, self.objects[self.path])

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def careless(s3: str) -> Iterator[S3Store]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Fresh", (Careless,), {"objects": {}})) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield s3_store(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


def test_a_server_that_ignores_conditions_is_unsafe(careless: S3Store) -> None:
    with pytest.raises(UnsafeStore, match="If-None-Match"):
        careless.probe()
    careless.put("a", b"0123456789")
    assert careless.get("a") == b"0123456789"


def test_a_server_that_ignores_ranges_is_not_believed(careless: S3Store, tmp_path: Path) -> None:
    careless.put("a", b"0123456789")
    with pytest.raises(StoreError, match="ranges"):
        careless.get("a", 2, 4)
    with pytest.raises(StoreError, match="ranges"):
        careless.download("a", tmp_path / "a")

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import DataError
from infra.records import DataObject, ShardRecord, SnapshotRecord, get_data, put_data, write_record
from infra.shards import (
    SELECTION_SCHEMA,
    TarWriter,
    _header,
    list_shards,
    parquet_bytes,
    read_index,
    read_selection,
    sample_key,
    shard_key,
    shard_number,
    shard_prefix,
)
from infra.store import FileStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    found = open_store(str(tmp_path / "store"))
    assert isinstance(found, FileStore)
    return found


def tar_of(members: list[tuple[str, bytes]]) -> tuple[bytes, list[tuple[int, int]]]:
    file = io.BytesIO()
    writer = TarWriter(file)
    places: list[tuple[int, int]] = [writer.add(name, data) for name, data in members]
    writer.finish()
    return file.getvalue(), places


MEMBERS = st.lists(
    st.tuples(st.text("abcdef0123456789", min_size=1, max_size=20), st.binary(max_size=2000)), max_size=8
)


@settings(max_examples=60)
@given(MEMBERS)
def test_a_tar_holds_its_members_in_order_and_each_is_where_the_writer_says(members: list[tuple[str, bytes]]) -> None:
    data, places = tar_of(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    assert found == members
    assert [data[offset : offset + length] for offset, length in places] == [body for _, body in members]
    assert tar_of(members)[0] == data


@settings(max_examples=60)
@given(st.from_regex(r"[!-~]{1,100}", fullmatch=True), st.integers(0, 2**33 - 1))
def test_a_header_is_the_one_that_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert _header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_tar_knows_its_hash() -> None:
    file = io.BytesIO()
    writer = TarWriter(file)
    writer.add("k.jpg", b"image")
    writer.finish()
    assert writer.sha256 == hashlib.sha256(file.getvalue()).hexdigest()


def test_a_tar_says_nothing_about_who_made_it_or_when() -> None:
    data, _ = tar_of([("k.jpg", b"image"), ("k.json", b"{}")])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644
    # The bytes themselves are the format: a change here makes every shard in the world another shard.
    assert hashlib.sha256(data).hexdigest() == "661da282b964acb988d86830cf7c5c63841ce7a1947a7fbea5d4d134caa8b873"


def test_webdataset_reads_the_tar(tmp_path: Path) -> None:
    data, _ = tar_of([("a.jpg", b"1"), ("a.json", b'{"n": 1}'), ("b.jpg", b"2"), ("b.json", b'{"n": 2}')])
    (tmp_path / "s.tar").write_bytes(data)
    samples = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode())
    assert [(sample["__key__"], sample["jpg"], sample["json"]["n"]) for sample in samples] == [
        ("a", b"1", 1),
        ("b", b"2", 2),
    ]


def test_data_is_named_by_its_hash_and_sent_once(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    sha256 = hashlib.sha256(b"hello").hexdigest()
    found = put_data(store, "data/32", "00001.tar", b"hello")
    assert found == DataObject(key=f"data/32/00001-{sha256}.tar", sha256=sha256, size=5)
    monkeypatch.setattr(FileStore, "put", lambda *_: pytest.fail("it was there already"))
    assert put_data(store, "data/32", "00001.tar", tmp_path / "file") == found
    assert get_data(store, found) == b"hello"


def test_damage_is_found_by_the_hash(store: FileStore) -> None:
    found = put_data(store, "data", "x.parquet", b"hello")
    store.put(found.key, b"hellO")
    with pytest.raises(DataError, match="damaged"):
        get_data(store, found)


def test_what_is_no_table_is_a_data_error(store: FileStore) -> None:
    record = shard(0, put_data(store, "data", "x.parquet", b"not parquet"))
    with pytest.raises(DataError, match="not a readable table"):
        read_index(store, record)


def shard(number: int, index: DataObject) -> ShardRecord:
    return ShardRecord(
        plan="p", size="32", number=number, tar=None, index=index, accepted=0, rejected={"empty": 2}, versions={}
    )


def test_shard_records_are_listed_by_number(store: FileStore) -> None:
    index = put_data(store, "data", "x.parquet", b"")
    for number in (100_000, 3, 11):
        write_record(store, shard_key("p", "32", number), shard(number, index))
    write_record(store, shard_key("p", "320", 4), shard(4, index))
    found = list(list_shards(store, shard_prefix("p", "32")))
    assert sorted(record.number for record in found) == [3, 11, 100_000]
    assert shard_number(shard_key("p", "32", 100_000)) == 100_000
    assert found[0].inputs == 2


def test_a_selection_comes_back_as_it_was_written(store: FileStore) -> None:
    rows = [
        {"key": f"k{n}", "tar": tar, "offset": 512, "length": 9, "width": 32, "height": 32}
        | {"captions": ["a", "b"], "caption_weights": [0.25, 0.75], "source": "web", "bucket": "32x32"}
        for n, tar in enumerate(["one.tar", "two.tar", "two.tar"])
    ]
    table = pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)
    both = [put_data(store, "data", "s.parquet", parquet_bytes(part)) for part in (table, table.slice(0, 1))]
    record = SnapshotRecord(
        shards="shards/p/32/",
        size="32",
        selection=both[0],
        held_out=both[1],
        rows=3,
        held_out_rows=1,
        by_shard=both[1],
        counts=[("accepted", 4)],
        by_source={"web": [4]},
        caption_shares={},
        forgotten=[],
    )
    assert read_selection(store, record).to_pylist() == rows
    assert read_selection(store, record).schema.equals(SELECTION_SCHEMA)
    assert read_selection(store, record, held_out=True).num_rows == 1
    assert read_selection(store, record, columns=["key"]).column_names == ["key"]


@given(st.text(), st.text(), st.text(), st.text())
def test_keys_are_plain_and_differ_with_source_and_name(a: str, b: str, c: str, d: str) -> None:
    a, b, c, d = (part.encode(errors="replace").decode().replace("\0", "") for part in (a, b, c, d))
    key = sample_key(a, b)
    assert len(key) == 20
    assert set(key) <= set("0123456789abcdef")
    assert (key == sample_key(c, d)) == ((a, b) == (c, d))

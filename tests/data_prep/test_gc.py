"""What `gc` deletes, and what it never may."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.prepare.originals import BatchRecord, batch_key
from data_prep.prepare.plan import Plan
from data_prep.prepare.retries import RetryRecord
from data_prep.snapshots.build import snapshot
from data_prep.snapshots.forget import forget
from data_prep.snapshots.settings import SnapshotSettings
from data_prep.upkeep.gc import Count, collect
from data_prep.upkeep.verify import verify
from infra import layout
from infra.errors import RecordError
from infra.records import CheckpointRecord, put_data, write_record
from infra.shards import parquet_bytes, read_selection
from infra.store import Entry, FileStore, Store, open_store
from tests.data_prep.corpora import contents, prepare_here, settings_for, write_corpus
from tests.infra.test_store import s3, s3_store

__all__ = ["s3"]  # a fixture

HOUR = 3600.0


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[FileStore, Plan]:
    """A corpus of a table, and one of a folder, whose listing is put in the store."""
    write_corpus(tmp_path / "corpus", 20)
    for number in range(4):
        (tmp_path / "corpus" / "images" / f"{number:05d}.txt").write_text("words")
    folder = {"kind": "text_folder", "name": "folder", "url": str(tmp_path / "corpus" / "images")}
    table = settings_for(tmp_path / "corpus").sources[0].model_dump(exclude_unset=True)
    store = FileStore(tmp_path / "store")
    return store, prepare_here(store, settings_for(tmp_path / "corpus", sources=[table, folder]))


def age(store: FileStore, hours: float = 25.0) -> None:
    """Make all that is there so old."""
    then = time.time() - HOUR * hours
    for entry in store.list():
        os.utime(store.root / entry.key, (then, then))


def orphan(store: Store, prefix: str, data: bytes = b"nobody's") -> str:
    return put_data(store, prefix, "00000.tar", data).key


def test_orphans_go_and_nothing_else(prepared: tuple[FileStore, Plan]) -> None:
    store, plan = prepared
    snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16, held_out=0.3))
    forget(store, ["images/00000.jpeg"], "asked")
    files = {"model.safetensors": put_data(store, "training/x/checkpoint", "model.safetensors", b"weights")}
    facts = {"run": "x", "step": 1, "position": 1, "snapshot": "x", "start_from": None, "parameters": 1}
    # A file of a checkpoint may lie anywhere: what counts is that a record names it.
    files["config.json"] = put_data(store, "data/checkpoints", "config.json", b"{}")
    write_record(
        store, "training/x/checkpoint.json", CheckpointRecord(folder="training/x/checkpoint", files=files, **facts)
    )
    unnamed = put_data(store, "training/x/state", "00000001-00000.safetensors", b"a state whose job was killed").key
    download = BatchRecord(
        batch="batch",
        attempt=0,
        began="then",
        asked={},
        kept=True,
        tar=put_data(store, "data/originals", "00000.tar", b"tar"),
        index=put_data(store, "data/originals", "00000.parquet", b"index"),
        accepted=1,
        rejected={},
    )
    write_record(store, batch_key("batch", 0), download)
    again = put_data(store, "data/originals", "again.parquet", b"table")
    write_record(
        store, layout.RETRY.at(list="place", generation=1), RetryRecord(table=again, rows=1, causes={"timeout": 1})
    )
    before = contents(store)
    assert any(key.startswith("data/tables/folder-") for key in before)
    orphans = {orphan(store, "data/16"): 8, orphan(store, "data/scores/x"): 8, orphan(store, "data/16", b"more"): 4}
    store.put("data/16/notes.txt", b"somebody's own")
    age(store)
    young = orphan(store, "data/originals")
    everything = contents(store)

    found = collect(store, dry_run=True)
    assert found.orphans == {"data/16": Count(2, 12), "data/scores": Count(1, 8)}
    assert set(found.first) == set(orphans)
    assert (found.young, found.foreign) == (1, 1)
    assert found.objects == sum(key.startswith("data/") for key in everything)
    assert contents(store) == everything

    assert collect(store) == found
    assert contents(store) == before | {young: b"nobody's", "data/16/notes.txt": b"somebody's own"}
    assert unnamed in before
    assert verify(store, plan.digest, plan.edition).problems == []
    assert collect(store).orphans == {}
    assert collect(store, 0.0).orphans == {"data/originals": Count(1, 8)}
    assert contents(store) == before | {"data/16/notes.txt": b"somebody's own"}


def test_what_a_snapshot_draws_from_stays_without_its_shards_records(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "corpus", rows_per_shard=1, sizes=[16]))
    record = snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16, held_out=0.4, filter="objects > 0"))
    halves = [set(read_selection(store, record, held_out=half)["tar"].to_pylist()) for half in (False, True)]
    assert all(halves) and halves[0].isdisjoint(halves[1])
    for entry in [*store.list("shards/")]:
        store.delete(entry.key)
    assert collect(store, 0.0).orphans
    assert {entry.key for entry in store.list("data/") if entry.key.endswith(".tar")} == halves[0] | halves[1]


def test_names_and_files_that_are_none_of_ours_stop_nothing(prepared: tuple[FileStore, Plan]) -> None:
    store, _ = prepared
    key, named = orphan(store, "data/16"), orphan(store, "data/16", b"named by a stranger")
    (store.root / "notes").mkdir()
    (store.root / "notes" / "lines.json").write_bytes(b'{"a": 1}\n{"b": "' + named.encode() + b'"}\n')
    for odd in (b"bad\xff.json", b"data/bad\xff-" + b"0" * 64 + b".tar"):
        Path(os.fsdecode(os.fsencode(store.root) + b"/" + odd)).write_bytes(b"{")
    found = collect(store, 0.0)
    assert (found.first, found.foreign, found.unknown) == ([key], 1, ["notes/lines.json"])
    assert not store.exists(key) and store.exists(named)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"key": "\xff"}', b"[" * 100_000])
def test_a_record_that_cannot_be_read_ends_it(prepared: tuple[FileStore, Plan], damage: bytes) -> None:
    store, _ = prepared
    orphan(store, "data/16")
    store.put(batch_key("batch", 0), damage)
    before = contents(store)
    with pytest.raises(RecordError, match=r"downloads/batches/batch\.0\.json.*nothing was deleted"):
        collect(store, 0.0)
    assert contents(store) == before


@pytest.mark.parametrize("table", [b"PAR1", parquet_bytes(pa.table({"number": [1]}))])
def test_a_plan_that_cannot_be_read_ends_it(prepared: tuple[FileStore, Plan], table: bytes) -> None:
    store, plan = prepared
    store.put(f"plans/{plan.digest}/00001.parquet", table)
    before = contents(store)
    with pytest.raises(RecordError, match=r"plans/.*/00001\.parquet cannot be read"):
        collect(store, 0.0)
    assert contents(store) == before


def test_a_snapshot_without_its_selection_ends_it(prepared: tuple[FileStore, Plan]) -> None:
    store, plan = prepared
    record = snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16))
    store.put(record.selection.key, b"PAR1")
    with pytest.raises(RecordError, match=r"snapshots/.*its data/snapshots/.*selection"):
        collect(store, 0.0)
    store.delete(record.selection.key)
    with pytest.raises(RecordError, match=r"snapshots/.*its data/snapshots/.*selection"):
        collect(store, 0.0)


def test_a_workflows_own_files_are_no_records(prepared: tuple[FileStore, Plan]) -> None:
    store, _ = prepared
    store.put("corpus/x/broken.json", b"{")
    store.put("mlartifacts/1/broken.json", b"{")
    key = orphan(store, "data/16")
    assert collect(store, 0.0).first == [key]


def test_a_name_is_found_wherever_it_stands_in_a_record(store: Store) -> None:
    keys = [orphan(store, "data/x", str(number).encode()) for number in range(4)]
    record = {"a": [{"b": keys[0]}, [keys[1]]], keys[2]: 1}
    store.put("some/kind/of/record.json", json.dumps(record).encode())
    assert collect(store, 0.0, dry_run=True).first == [keys[3]]


class Busy(FileStore):
    """A folder in which a job ends just before it is listed for the second time."""

    ending: tuple[str, bytes] | None = None
    lists = 0

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        self.lists += 1
        if self.ending is not None and self.lists == 2:
            self.put(*self.ending)
        yield from super().list_unchecked(prefix)


@pytest.mark.parametrize("there", [False, True])
def test_a_record_that_comes_meanwhile_keeps_what_it_names(tmp_path: Path, there: bool) -> None:
    """A new one, and one that is made anew in the place of another."""
    store = Busy(tmp_path)
    kept, lost = orphan(store, "data/16"), orphan(store, "data/16", b"lost")
    if there:
        store.put("shards/x/16/00000.json", b"{}")
        age(store)
        store.lists = 0
    store.ending = "shards/x/16/00000.json", json.dumps({"tar": {"key": kept}}).encode()
    assert collect(store, 0.0).first == [lost]
    assert store.exists(kept)
    assert not store.exists(lost)


def test_a_record_that_goes_meanwhile_is_none(tmp_path: Path) -> None:
    """Training deletes its old states."""

    class Going(FileStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            self.delete(key)
            return super().get(key, start, end)

    store = Going(tmp_path)
    store.put("training/x/states/00000001.json", b"{}")
    assert collect(store).orphans == {}


def test_on_a_server(s3: str) -> None:
    store = s3_store(f"http://{s3}", page_size=2)
    keys = sorted(orphan(store, f"data/{number}") for number in range(5))
    store.put("a/record.json", json.dumps({"key": keys[2]}).encode())
    found = collect(store, 1.0)
    assert (found.orphans, found.young) == ({}, 4)
    assert all(abs(entry.modified - time.time()) < HOUR / 2 for entry in store.list())
    assert collect(store, -1 / HOUR).first == [key for key in keys if key != keys[2]]
    assert [entry.key for entry in store.list("data/")] == [keys[2]]

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.plan import Plan
from data_prep.verify import verify
from infra.records import ShardRecord, read_record
from infra.shards import read_index, shard_key
from infra.store import Store, open_store
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Store, Plan]:
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    return store, prepare_here(store, settings_for(tmp_path / "corpus", sizes=[16]))


def first_shard(store: Store, plan: Plan) -> ShardRecord:
    return read_record(store, shard_key(plan.digest, "16", 0), ShardRecord)


def test_nothing_is_wrong_with_what_prepare_made(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    found = verify(store, plan.digest, plan.edition)
    assert found.problems == []
    assert (found.shards, found.inputs) == (3, 20)
    assert 0 < found.images < 20


def test_one_wrong_bit_in_an_image_is_found(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    record = first_shard(store, plan)
    assert record.tar is not None
    data = bytearray(store.get(record.tar.key))
    row = next(row for row in read_index(store, record).to_pylist() if row["accepted"])
    data[row["offset"] + row["length"] // 2] ^= 1
    store.put(record.tar.key, bytes(data))
    assert verify(store, plan.digest, plan.edition).problems == [
        "shard 0 at 16: its tar does not have the hash in its name",
        f"shard 0 at 16: the image of {row['key']} does not have the index's hash",
    ]


def test_missing_and_damaged_parts_are_listed(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    record = first_shard(store, plan)
    assert record.tar is not None
    store.put(record.index.key, b"PAR1")
    store.put(
        shard_key(plan.digest, "16", 2),
        read_record(store, shard_key(plan.digest, "16", 2), ShardRecord)
        .model_copy(update={"rejected": {"corrupt": 1}})
        .model_dump_json()
        .encode(),
    )
    store.delete(shard_key(plan.digest, "16", 1))
    store.put(shard_key(plan.digest, "16", 7), record.model_copy(update={"number": 7}).model_dump_json().encode())
    problems = verify(store, plan.digest, plan.edition).problems
    assert [problem.split(":")[0] for problem in problems] == [f"shard {number} at 16" for number in (0, 1, 2, 7)]
    assert "damaged" in problems[0]
    assert problems[1].endswith("not prepared")
    assert problems[2].endswith("count differently")
    assert problems[3].endswith("in no plan")


def test_a_cut_tar_is_a_problem_not_a_crash(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    record = first_shard(store, plan)
    assert record.tar is not None
    store.put(record.tar.key, store.get(record.tar.key)[:3000])
    assert len(verify(store, plan.digest, plan.edition).problems) >= 2
    store.delete(record.tar.key)
    assert "shard 0" in verify(store, plan.digest, plan.edition).problems[0]

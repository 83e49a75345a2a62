from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_prep.plan import Edition, Plan, PrepareSettings, edition_key
from data_prep.verify import Verified, verify
from infra.config import parse
from infra.errors import StoreError
from infra.records import ShardRecord, put_data, read_record
from infra.shards import TarWriter, parquet_bytes, read_index, shard_key
from infra.store import FileStore, Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import prepare_here, settings_for, shaded, write_corpus


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


def test_a_text_that_is_not_the_first_caption_is_found(prepared: tuple[Store, Plan]) -> None:
    """In a tar that is otherwise what it should be, hash and all."""
    store, plan = prepared
    record = first_shard(store, plan)
    assert record.tar is not None
    other = store.get(record.tar.key).replace(b"picture 2", b"picture 3", 3)
    tar = put_data(store, "data/16", "00000.tar", other.replace(b"picture 3", b"picture 2", 2))
    store.put(shard_key(plan.digest, "16", 0), record.model_copy(update={"tar": tar}).model_dump_json().encode())
    key = next(row["key"] for row in read_index(store, record).to_pylist() if row["captions"][0]["text"] == "picture 2")
    assert verify(store, plan.digest, plan.edition).problems == [
        f"shard 0 at 16: {key}.txt is not the first caption of the index"
    ]


@pytest.mark.parametrize("text", [True, False])
def test_what_was_prepared_before_there_were_texts_is_whole_without_them(tmp_path: Path, text: bool) -> None:
    write_corpus(tmp_path / "corpus", 10)
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "corpus", sizes=[16], text=text))
    edition = read_record(store, edition_key(plan.digest, plan.edition), Edition)
    older = edition.model_copy(update={"settings": {k: v for k, v in edition.settings.items() if k != "text"}})
    store.put(edition_key(plan.digest, plan.edition), older.model_dump_json().encode())
    problems = verify(store, plan.digest, plan.edition).problems
    assert [problem.endswith("does not hold the accepted rows, in order") for problem in problems] == [True] * 2 * text


def record_of(store: Store, plan: Plan, number: int) -> ShardRecord:
    return read_record(store, shard_key(plan.digest, "16", number), ShardRecord)


def verified(store: Store, plan: Plan) -> Verified:
    return verify(store, plan.digest, plan.edition)


def test_a_record_that_cannot_be_read_hides_nothing_else(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    store.put(shard_key(plan.digest, "16", 0), b"{not JSON")
    store.put(record_of(store, plan, 2).index.key, b"PAR1")
    store.put(shard_key(plan.digest, "16", 1)[:-5] + "-copy.json", b"{}")
    found = verified(store, plan)
    assert [problem.split(":")[0] for problem in found.problems] == [f"shard {n} at 16" for n in ("0", "2", "1-copy")]
    assert "not a readable ShardRecord" in found.problems[0]
    assert (found.shards, len(found.again), found.lasting) == (2, 2, 1)


def test_a_record_of_another_shard_is_damage(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    store.put(shard_key(plan.digest, "16", 1), store.get(shard_key(plan.digest, "16", 0)))
    found = verified(store, plan)
    assert found.problems == ["shard 1 at 16: its record speaks of another shard"]
    assert (found.objects, found.records) == ([], [shard_key(plan.digest, "16", 1)])


def test_a_record_may_lead_to_no_other_object(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    record = first_shard(store, plan)
    stray = put_data(store, "data/16", "00000.parquet", b"somebody's")
    for key in (edition_key(plan.digest, plan.edition), "../data/16/x", stray.key):
        index = record.index.model_copy(update={"key": key})
        wrong = record.model_copy(update={"index": index})
        store.put(shard_key(plan.digest, "16", 0), wrong.model_dump_json().encode())
        found = verified(store, plan)
        assert found.problems == ["shard 0 at 16: its record speaks of another shard"]
        assert found.objects == []


def test_only_objects_without_their_hash_are_damaged(prepared: tuple[Store, Plan]) -> None:
    """A record that counts wrongly is made again; its data are what they are called, and stay."""
    store, plan = prepared
    counted = record_of(store, plan, 0).model_copy(update={"accepted": 0, "rejected": {"corrupt": 8}})
    store.put(shard_key(plan.digest, "16", 0), counted.model_dump_json().encode())
    tar = record_of(store, plan, 1).tar
    assert tar is not None
    store.put(tar.key, store.get(tar.key)[:-1] + b"!")
    lost = record_of(store, plan, 2)
    store.put(shard_key(plan.digest, "16", 2), b"")
    store.put(lost.index.key, b"x" * lost.index.size)
    found = verified(store, plan)
    assert found.objects == [tar.key, lost.index.key]
    assert found.records == [shard_key(plan.digest, "16", number) for number in range(3)]


def test_all_shards_of_a_planned_one_are_looked_at(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "corpus", sizes=[512], shard_mib=1, rows_per_shard=20))
    assert (plan.sizes["512"], len(plan.shards)) == (4, 1)
    assert verified(store, plan).problems == []
    for number in (0, 2):
        store.put(read_record(store, shard_key(plan.digest, "512", number), ShardRecord).index.key, b"PAR1")
    found = verified(store, plan)
    assert [problem.split(":")[0] for problem in found.problems] == ["shard 0 at 512", "shard 2 at 512"]
    assert (len(found.objects), len(found.records), len(found.again)) == (2, 4, 4)


def put_index(store: Store, number: int, index: pa.Table) -> Any:
    return put_data(store, "data/16", f"{number:05d}.parquet", parquet_bytes(index))


def change_rows(store: Store, plan: Plan, number: int, change: Callable[[Any], Any]) -> None:
    """Another shard in all its parts, with other numbers for its rows."""
    record = record_of(store, plan, number)
    index = read_index(store, record)
    rows = change(index["row"])
    index = index.set_column(index.schema.get_field_index("row"), index.schema.field("row"), rows)
    other = record.model_copy(update={"index": put_index(store, number, index)})
    store.put(shard_key(plan.digest, "16", number), other.model_dump_json().encode())


@pytest.fixture
def tarred(tmp_path: Path) -> tuple[Store, Plan]:
    (tmp_path / "corpus").mkdir()
    with (tmp_path / "corpus" / "0.tar").open("wb") as file:
        tar = TarWriter(file)
        for number in range(40):
            tar.add(f"{number:03d}.jpg", zoo.saved(shaded(number, 40), "JPEG"))
            tar.add(f"{number:03d}.txt", b"a picture")
        tar.finish()
    source = {"kind": "webdataset", "name": "tars", "url": str(tmp_path / "corpus"), "tars": ["*.tar"]}
    store = open_store(str(tmp_path / "store"))
    return store, prepare_here(store, parse(PrepareSettings, {"sources": [source], "sizes": [16], "rows_per_shard": 8}))


@pytest.mark.parametrize("by", [-1, 1])
def test_the_ranges_of_a_tar_follow_on_each_other(tarred: tuple[Store, Plan], by: int) -> None:
    store, plan = tarred
    assert len(plan.shards) > 3 and not any(shard.counted for shard in plan.shards)
    assert verified(store, plan).problems == []
    change_rows(store, plan, 2, lambda rows: pc.add(rows, by))
    found = verified(store, plan)
    assert [problem.split(":")[0] for problem in found.problems] == ["shard 2 at 16", "shard 3 at 16"]
    assert found.records == [shard_key(plan.digest, "16", number) for number in (2, 1, 3)]
    assert found.objects == []


def test_the_first_range_of_a_tar_begins_with_its_first_row(tarred: tuple[Store, Plan]) -> None:
    store, plan = tarred
    change_rows(store, plan, 0, lambda rows: pc.add(rows, 1))
    problems = verified(store, plan).problems
    assert problems[0] == "shard 0 at 16: its first row is 1, the shards before it end before row 0"


def test_a_range_that_is_not_there_leaves_a_gap_and_no_overlap(tarred: tuple[Store, Plan]) -> None:
    store, plan = tarred
    store.delete(shard_key(plan.digest, "16", 1))
    assert verified(store, plan).problems == ["shard 1 at 16: not prepared"]
    first = read_index(store, record_of(store, plan, 0)).num_rows
    change_rows(store, plan, 2, lambda rows: pc.add(rows, first - 1 - rows[0].as_py()))
    assert verified(store, plan).problems[1].startswith(f"shard 2 at 16: its first row is {first - 1}, ")


def test_a_retry_has_each_row_once(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    key = f"plans/{plan.digest}/00000.parquet"
    table = pq.read_table(pa.BufferReader(store.get(key)))
    again = pa.array([1] * table.num_rows, pa.int32())
    table = table.set_column(table.schema.get_field_index("generation"), table.schema.field("generation"), again)
    store.put(key, parquet_bytes(table))
    edition = read_record(store, edition_key(plan.digest, plan.edition), Edition)
    edition = edition.model_copy(update={"inputs": [given._replace(generation=1) for given in edition.inputs]})
    store.put(edition_key(plan.digest, plan.edition), edition.model_dump_json().encode())
    change_rows(store, plan, 2, lambda rows: pc.add(rows, 100))
    assert verified(store, plan).problems == []
    change_rows(store, plan, 1, lambda rows: pc.subtract(rows, 1))
    assert verified(store, plan).problems == [
        "shard 1 at 16: its first row is 7, the shards before it end before row 8",
    ]


def test_what_the_store_cannot_read_is_told_and_not_given_up(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    record = first_shard(store, plan)

    class BadDisk(FileStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key == record.index.key:
                raise StoreError(f"failed at {key}", remedy="check the disk")
            return super().get(key, start, end)

    assert isinstance(store, FileStore)
    found = verified(BadDisk(store.root), plan)
    assert (len(found.problems), found.lasting, len(found.again), found.objects, found.records) == (1, 1, 0, [], [])

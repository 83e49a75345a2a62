from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_prep.prepare.plan import Edition, Plan, PrepareSettings
from data_prep.scores.job import Place
from data_prep.snapshots.build import snapshot
from data_prep.snapshots.settings import SnapshotSettings
from data_prep.upkeep.verify import Verified, verify, verify_shared
from infra import layout
from infra.config import parse
from infra.errors import StoreError
from infra.records import (
    ScoreRecord,
    ScoreSummary,
    ShardRecord,
    SnapshotOutput,
    SnapshotRecord,
    StageRecord,
    put_data,
    read_record,
    write_record,
)
from infra.shards import TarWriter, parquet_bytes, read_index, read_selection, shard_key
from infra.store import FileStore, Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import prepare_here, settings_for, shaded, write_corpus
from tests.data_prep.test_snapshot import scored


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
    edition = read_record(store, layout.EDITION.at(plan=plan.digest, edition=plan.edition), Edition)
    older = edition.model_copy(update={"settings": {k: v for k, v in edition.settings.items() if k != "text"}})
    store.put(layout.EDITION.at(plan=plan.digest, edition=plan.edition), older.model_dump_json().encode())
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
    for key in (layout.EDITION.at(plan=plan.digest, edition=plan.edition), "../data/16/x", stray.key):
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
    edition = read_record(store, layout.EDITION.at(plan=plan.digest, edition=plan.edition), Edition)
    edition = edition.model_copy(update={"inputs": [given._replace(generation=1) for given in edition.inputs]})
    store.put(layout.EDITION.at(plan=plan.digest, edition=plan.edition), edition.model_dump_json().encode())
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


# Scores


@pytest.fixture
def with_scores(prepared: tuple[Store, Plan]) -> tuple[Store, Plan]:
    """Of two scorers; the first says that it is done."""
    for scorer in ("first", "second"):
        scored(
            prepared,
            scorer,
            score=lambda keys: pa.array([float(len(key)) for key in keys]),
            score_failure=lambda keys: pa.array(["odd" if key < "4" else None for key in keys], pa.string()),
        )
    store, plan = prepared
    numbers = sorted(plan.all_numbers("16"))
    place = Place(plan.digest, "16", "first")
    records = [read_record(store, place.key(number), ScoreRecord) for number in numbers]
    summary = ScoreSummary(
        **place._asdict(),
        settings={},
        columns=["score", "score_failure"],
        shards=len(numbers),
        rows=sum(record.rows for record in records),
        failures=dict(sum((Counter(record.failures) for record in records), Counter[str]())),
        versions=[],
    )
    write_record(store, place.summary_key(numbers), summary)
    return prepared


def score_key(plan: Plan, number: int, scorer: str = "first") -> str:
    return Place(plan.digest, "16", scorer).key(number)


def spoil(store: Store, key: str) -> str:
    store.put(key, store.get(key)[:-1] + b"!")
    return key


def test_nothing_is_wrong_with_scores_that_fit(with_scores: tuple[Store, Plan]) -> None:
    found = verified(*with_scores)
    assert (found.problems, found.scores, found.damaged) == ([], 6, False)


def test_damaged_scores_are_told_and_no_shard_with_them(with_scores: tuple[Store, Plan]) -> None:
    store, plan = with_scores
    keys = [score_key(plan, number) for number in range(3)]
    table = spoil(store, read_record(store, keys[0], ScoreRecord).table.key)
    store.put(keys[1], b"{not JSON")
    record = read_record(store, keys[2], ScoreRecord)
    store.put(keys[2], record.model_copy(update={"failures": {"odd": 99}}).model_dump_json().encode())
    found = verified(store, plan)
    assert [problem.split(":")[0] for problem in found.problems] == [
        f"scores first of shard {number} at 16" for number in range(3)
    ]
    assert "hash in its name" in found.problems[0] and "ScoreRecord" in found.problems[1]
    assert found.problems[2].endswith("its table and its record count differently")
    assert (found.scores_again, found.objects) == (keys, [table])
    assert (found.again, found.records, found.lasting) == ([], [], 0)


def test_scores_of_other_samples_are_damage(with_scores: tuple[Store, Plan]) -> None:
    store, plan = with_scores
    other = read_record(store, score_key(plan, 1), ScoreRecord)
    for number, key in enumerate((score_key(plan, 0), score_key(plan, 0, "second"))):
        table = other.table
        if number:  # of the right name, and other keys
            data = pq.read_table(pa.BufferReader(store.get(table.key)))
            table = put_data(store, "data/scores/second", "00000.parquet", parquet_bytes(data))
        facts = {"number": 0, "table": table, "scorer": ("first", "second")[number]}
        store.put(key, other.model_copy(update=facts).model_dump_json().encode())
    assert verified(store, plan).problems == [
        "scores first of shard 0 at 16: its record speaks of another table",
        "scores second of shard 0 at 16: it is not of the samples that the shard holds",
    ]


def test_a_summary_of_scores_counts_what_their_records_do(with_scores: tuple[Store, Plan]) -> None:
    store, plan = with_scores
    [key] = [entry.key for entry in store.list("scored/")]
    summary = read_record(store, key, ScoreSummary)
    store.put(key, summary.model_copy(update={"rows": summary.rows + 1}).model_dump_json().encode())
    found = verified(store, plan)
    assert found.problems == ["scores first at 16: their summary and their records count differently"]
    assert found.scores_again == [key]


def test_scores_that_are_said_to_be_there_must_be(with_scores: tuple[Store, Plan]) -> None:
    store, plan = with_scores
    for scorer in ("first", "second"):
        store.delete(score_key(plan, 1, scorer))
    found = verified(store, plan)
    assert found.problems == ["scores first at 16: 1 shards have none, the first 1"], "the second may be under way"
    assert found.scores_again == [score_key(plan, 1)]
    [summary] = [entry.key for entry in store.list("scored/")]
    store.put(summary, b"{}")
    found = verified(store, plan)
    assert found.scores_again == [score_key(plan, 1), summary] and len(found.problems) == 2


# Selections


@pytest.fixture
def with_snapshots(prepared: tuple[Store, Plan]) -> tuple[Store, Plan]:
    store, plan = prepared
    for wanted in ({"held_out": 0.4}, {"filter": "objects > 0"}):
        snapshot(store, plan.digest, plan.edition, parse(SnapshotSettings, {"size": 16, **wanted}))
    return prepared


def snapshots(store: Store) -> dict[str, SnapshotRecord]:
    return {entry.key: read_record(store, entry.key, SnapshotRecord) for entry in store.list("snapshots/")}


def test_nothing_is_wrong_with_what_snapshots_list(with_snapshots: tuple[Store, Plan]) -> None:
    found = verified(*with_snapshots)
    assert (found.problems, found.snapshots, found.damaged) == ([], 2, False)
    assert not verify_shared(with_snapshots[0]).problems


@pytest.mark.parametrize("part", ["selection", "held_out", "by_shard"])
def test_damaged_selections_are_told(with_snapshots: tuple[Store, Plan], part: str) -> None:
    store, plan = with_snapshots
    [key, *_] = [key for key, record in snapshots(store).items() if record.held_out_rows]
    data = spoil(store, getattr(snapshots(store)[key], part).key)
    found = verified(store, plan)
    assert len(found.problems) == 1 and found.problems[0].startswith(f"snapshot {Path(key).stem}: ")
    assert (found.snapshots_again, found.objects, found.again) == ([key], [data], [])


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("offset", lambda values: pc.add(values, 512)),
        ("length", lambda values: pc.add(values, 1)),
        ("width", lambda values: pc.add(values, pa.scalar(1, pa.int32()))),
        ("key", lambda values: pa.array(["0" * 20] * len(values))),
        ("source", lambda values: pa.array(["other"] * len(values)).dictionary_encode()),
        ("captions", lambda values: pa.array([[]] * len(values), pa.list_(pa.string()))),
    ],
)
def test_every_row_of_a_selection_is_as_the_index_says(
    with_snapshots: tuple[Store, Plan], column: str, change: Callable[[Any], Any]
) -> None:
    """In a selection that has the hash of its name."""
    store, plan = with_snapshots
    [key, record] = next(iter(snapshots(store).items()))
    table = read_selection(store, record)
    place = table.schema.get_field_index(column)
    table = table.set_column(place, column, change(table[column].combine_chunks()))
    other = put_data(store, "data/snapshots", f"{Path(key).stem}-selection.parquet", parquet_bytes(table))
    store.put(key, record.model_copy(update={"selection": other}).model_dump_json().encode())
    found = verified(store, plan)
    assert found.snapshots_again == [key] and found.objects == []
    assert all("its selection: " in problem and "not as the index" in problem for problem in found.problems)


def test_counts_of_a_snapshot_are_those_of_its_rows(with_snapshots: tuple[Store, Plan]) -> None:
    store, plan = with_snapshots
    [key, record] = next(iter(snapshots(store).items()))
    store.put(key, record.model_copy(update={"rows": record.rows + 1}).model_dump_json().encode())
    problems = [problem.partition(": ")[2] for problem in verified(store, plan).problems]
    assert problems == [
        "its record counts differently from its own steps",
        "its counts by shard and its record differ",
        f"its selection: it has {record.rows} rows, and by its record {record.rows + 1}",
    ]


def test_images_of_a_tar_that_no_record_names_are_told(with_snapshots: tuple[Store, Plan]) -> None:
    store, plan = with_snapshots
    record = first_shard(store, plan)
    assert record.tar is not None
    data = store.get(record.tar.key)
    other = put_data(store, "data/16", "00000.tar", data + bytes(512))
    store.put(shard_key(plan.digest, "16", 0), record.model_copy(update={"tar": other}).model_dump_json().encode())
    found = verified(store, plan)
    assert found.problems and all("which no shard's record names" in problem for problem in found.problems)
    assert set(found.snapshots_again) == set(snapshots(store))


def test_a_damaged_shard_is_told_once_and_not_by_its_snapshots(with_snapshots: tuple[Store, Plan]) -> None:
    store, plan = with_snapshots
    spoil(store, first_shard(store, plan).index.key)
    assert [problem.split(":")[0] for problem in verified(store, plan).problems] == ["shard 0 at 16"]


def test_records_of_snapshots_that_nobody_can_read_are_told(with_snapshots: tuple[Store, Plan]) -> None:
    store, plan = with_snapshots
    [unread, gone] = snapshots(store)
    record = snapshots(store)[unread]
    spoil(store, record.selection.key)
    store.put(unread, b"{not JSON")
    stage = StageRecord(
        stage="data",
        kind="snapshot",
        digest_of_work="d",
        inputs={},
        settings={},
        output=SnapshotOutput(record=gone, rows=0, counts=[], size="16"),
        versions={},
        started="",
        seconds=0.0,
    )
    write_record(store, "stages/snapshot/d.json", stage)
    store.delete(gone)
    assert verified(store, plan).problems == []
    found = verify_shared(store)
    assert [problem.split(":")[0] for problem in found.problems] == [
        f"snapshot {Path(key).stem}" for key in (unread, gone)
    ]
    assert (found.snapshots_again, found.objects) == ([unread, gone], [record.selection.key])

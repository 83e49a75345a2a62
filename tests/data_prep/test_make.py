from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from data_prep.prepare.plan import PrepareSettings, make_plan
from data_prep.prepare.shard import make_shard, plain_outcomes
from data_prep.rejections import Cause
from infra.records import ShardRecord
from infra.shards import INDEX_SCHEMA, read_index
from infra.store import FileStore, Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import settings_for


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def make(store: Store, settings: PrepareSettings) -> list[ShardRecord]:
    plan = make_plan(store, settings)
    assert len(plan.shards) == 1
    return make_shard(store, settings, plan, plan.shards[0], None, partial(plain_outcomes, settings=settings))


def write(folder: Path, sides: list[tuple[int, int]], **columns: list[object]) -> PrepareSettings:
    rows = []
    for number, (height, width) in enumerate(sides):
        (folder / f"{number}.png").write_bytes(zoo.saved(zoo.picture(height, width), "PNG"))
        rows.append({"image": f"{number}.png", "short": f"s{number}", "long": f"l{number}"})
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, folder / "table.parquet")
    source = settings_for(folder).sources[0].model_dump() | {"keep": list(columns)}
    return settings_for(folder, sources=[source])


def test_each_size_has_its_own_fate_and_the_index_says_which(corpus: Path, store: Store) -> None:
    large, small = make(store, write(corpus, [(40, 50), (20, 30), (10, 99)]))
    assert (large.accepted, large.rejected) == (1, {"too_small": 2})
    assert (small.accepted, small.rejected) == (2, {"too_small": 1})
    rows = read_index(store, small).to_pylist()
    assert [row["cause"] for row in rows] == [None, None, Cause.TOO_SMALL]
    first = rows[0]
    assert (first["original_width"], first["original_height"], first["format"]) == (50, 40, "png")
    assert [first[f"crop_{side}"] for side in ("left", "top", "width", "height")] == [5, 0, 40, 40]
    assert (first["width"], first["height"]) == (16, 16)
    assert (rows[2]["original_width"], rows[2]["width"], rows[2]["offset"]) == (99, None, None)
    assert rows[2]["captions"] == [{"kind": "short", "text": "s2"}, {"kind": "long", "text": "l2"}]
    assert rows[0]["key"] == read_index(store, large).to_pylist()[0]["key"]
    assert small.tar is not None
    data = store.get(small.tar.key)
    for row in rows[:2]:
        assert simplejpeg.decode_jpeg_header(data[row["offset"] :][: row["length"]])[:2] == (16, 16)


def test_a_shard_of_rejections_has_an_index_and_no_tar(corpus: Path, store: Store) -> None:
    large, small = make(store, write(corpus, [(20, 20)] * 3))
    assert (large.tar, large.accepted, large.inputs) == (None, 0, 3)
    assert small.tar is not None
    assert read_index(store, large)["cause"].to_pylist() == [Cause.TOO_SMALL] * 3


def test_kept_columns_keep_their_types_and_values(corpus: Path, store: Store) -> None:
    settings = write(
        corpus,
        [(40, 40)] * 2,
        n=[1, None],
        x=[0.5, float("nan")],
        tags=[["a", "b"], []],
        word=["é", "w"],
        yes=[True, None],
    )
    record = make(store, settings)[0]
    index = read_index(store, record)
    kept = index.select(["n", "x", "tags", "word", "yes"])
    assert kept.schema.types == [pa.int64(), pa.float64(), pa.list_(pa.string()), pa.string(), pa.bool_()]
    assert index.schema.names[: len(INDEX_SCHEMA)] == INDEX_SCHEMA.names
    assert kept.to_pylist()[0] == {"n": 1, "x": 0.5, "tags": ["a", "b"], "word": "é", "yes": True}
    assert record.tar is not None
    row = index.to_pylist()[1]
    said = json.loads(store.get(record.tar.key, row["json_offset"], row["json_offset"] + row["json_length"]))
    assert (said["n"], said["x"], said["tags"], said["word"], said["yes"]) == (None, None, [], "w", None)
    assert said["key"] == row["key"]


class Watched(FileStore):
    """Remembers what was written, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[str] = []

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        self.written.append(key)

    def create(self, key: str, data: bytes | Path) -> bool:
        self.written.append(key)
        return super().create(key, data)


def test_a_record_is_written_after_the_data_that_it_names(corpus: Path, tmp_path: Path) -> None:
    store = Watched(tmp_path / "store")
    records = make(store, write(corpus, [(40, 40)] * 2))
    for record in records:
        assert record.tar is not None
        at = store.written.index(f"shards/{record.plan}/{record.size}/00000.json")
        assert {record.tar.key, record.index.key} <= set(store.written[:at])


def test_a_record_that_is_there_is_not_replaced(corpus: Path, store: Store) -> None:
    settings = write(corpus, [(40, 40)] * 2)
    first = make(store, settings)
    key = f"shards/{first[0].plan}/32/00000.json"
    theirs = first[0].model_copy(update={"versions": {"simplejpeg": "another"}})
    store.put(key, theirs.model_dump_json().encode())
    assert make(store, settings)[0] == theirs

"""SA-1B: the captions' join, and looking them up in it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rejections import Cause
from data_prep.sources import Sa1b, joined
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.store import Store
from tests.data_prep.test_sources import all_items, all_ranges, problem, said
from tests.data_prep.test_sources_damage import write_pages, zeroed
from tests.data_prep.test_sources_packed import PACKERS
from tests.data_prep.test_sources_tars import member, pairs, tar_bytes


def sa1b(folder: Path, **changes: Any) -> Sa1b:
    plain = {"kind": "sa1b", "name": "s", "url": str(folder), "tables": ["*.parquet"]}
    return parse(Sa1b, plain | changes)


def write_tar(folder: Path, name: str, *ids: int) -> None:
    members = [
        each
        for number in ids
        for each in (member(f"./sa_{number}.jpg", b"I%d" % number), member(f"./sa_{number}.json", b"x" * 2_000_000))
    ]
    (folder / name).write_bytes(tar_bytes(*members))


def test_captions_come_from_a_table(folder: Path, store: Store) -> None:
    write_tar(folder, "sa_000000.tar", 1, 2, 3)
    write_tar(folder, "sa_000001.tar", 4, 5, 6)
    rows = [
        {"image_id": 6, "short": "six", "long": ["the six", None], "n": 6, "l": "MIT", "o": "https://six.example"},
        {"image_id": 2, "short": "two", "long": None, "n": 2, "l": None, "o": None},
        {"image_id": None, "short": "nothing", "long": None, "n": 2, "l": None, "o": None},
        {"image_id": 4, "short": "bell\x07", "long": None, "n": None, "l": None, "o": None},
        {"image_id": 5, "short": " ", "long": [], "n": None, "l": None, "o": None},
        {"image_id": 2, "short": "two again", "long": None, "n": 3, "l": None, "o": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    columns = {"licence_column": "l", "origin_column": "o", "licence": "CC", "origin": "SA-1B"}
    source = sa1b(folder, captions=["short", "long"], keep=["n"], **columns)
    items = all_items(store, source, rows=2)
    assert [(item.name, problem(item), said(item)) for item in items] == [
        ("sa_000000.tar/./sa_1.jpg", Cause.NO_CAPTION, []),
        ("sa_000000.tar/./sa_2.jpg", None, [("short", "two")]),
        ("sa_000000.tar/./sa_3.jpg", Cause.NO_CAPTION, []),
        ("sa_000001.tar/./sa_4.jpg", Cause.BAD_CAPTION, []),
        ("sa_000001.tar/./sa_5.jpg", Cause.NO_CAPTION, []),
        ("sa_000001.tar/./sa_6.jpg", None, [("short", "six"), ("long", "the six")]),
    ]
    assert [item.row for item in items] == [0, 1, 2, 0, 1, 2]
    assert [item.kept["n"] for item in items] == [None, 2, None, None, None, 6]
    assert (items[5].image, items[5].licence, items[5].origin) == (b"I6", "MIT", "https://six.example")
    assert (items[1].licence, items[1].origin) == ("CC", "SA-1B")
    part = all_ranges(store, source)[0]
    assert source.kept_fields(store, part) == [pa.field("n", pa.int64())]


@pytest.mark.parametrize(
    "ids", [[1, 22], ["1", "22"], ["sa_1", "sa_22"], ["x/sa_000001.jpg", "sa_22.json"], [1.0, 22.0]]
)
def test_ids_in_any_way_that_tables_write_them(folder: Path, store: Store, ids: list[Any]) -> None:
    write_tar(folder, "a.tar", 1, 22)
    rows = [{"image_id": given, "caption": f"said {n}"} for n, given in enumerate(ids)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet")
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "c.csv").write_text(
        "image_id,caption\n" + "".join(f"{row['image_id']},{row['caption']}\n" for row in rows)
    )
    for table in ("c.parquet", "c.jsonl", "c.csv"):
        items = all_items(store, sa1b(folder, tables=[table]))
        assert [said(item) for item in items] == [[("caption", "said 0")], [("caption", "said 1")]]


def test_a_join_of_many_rows_in_many_tables(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small piles and row groups, ids in disorder and of all kinds, and many rows of one id."""
    monkeypatch.setattr(joined, "PILE", 50)
    monkeypatch.setattr(joined, "GROUP", 7)
    monkeypatch.setattr(joined, "HELD", 2)
    ids = [*(str(n * n) for n in range(300)), *(f"name-{n}" for n in range(200)), *["9"] * 100]
    shuffled = random.Random(0).sample(ids, len(ids))
    rows = [{"image_id": name, "caption": f"{name}"} for name in shuffled]
    for n in range(3):
        pq.write_table(pa.Table.from_pylist(rows[n::3]), folder / f"{n}.parquet", row_group_size=40)
    wanted = [*random.Random(1).sample(ids[:500], 100), "9", "4", "nobody", "10", "89401"]
    members = [each for name in wanted for each in pairs(name)]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    items = all_items(store, sa1b(folder))
    expected = [[("caption", name)] if name in ids else [] for name in wanted]
    assert [said(item) for item in items] == expected
    assert sum(problem(item) is Cause.NO_CAPTION for item in items) == 2  # nobody and 10


def test_a_table_without_rows(folder: Path, store: Store) -> None:
    write_tar(folder, "a.tar", 1)
    pq.write_table(
        pa.table({"image_id": pa.array([], pa.int64()), "caption": pa.array([], pa.string())}), folder / "a.parquet"
    )
    assert [problem(item) for item in all_items(store, sa1b(folder))] == [Cause.NO_CAPTION]


def test_tables_without_rows_or_values_go_with_others(folder: Path, store: Store) -> None:
    write_tar(folder, "a.tar", 1, 2)
    (folder / "a.jsonl").write_text("\n")
    (folder / "a.csv").write_text("image_id,caption,n\n")
    pq.write_table(pa.table({}), folder / "a.parquet")
    source = sa1b(folder, tables=["*.jsonl", "*.csv", "*.parquet"], keep=["n"])
    assert [problem(item) for item in all_items(store, source)] == [Cause.NO_CAPTION] * 2
    pq.write_table(pa.table({"image_id": [1], "caption": ["one"], "n": pa.nulls(1)}), folder / "b.parquet")
    (folder / "c.jsonl").write_text('{"image_id": 2, "caption": null, "n": 2}')
    items = all_items(store, source)
    assert [(problem(item), item.kept["n"]) for item in items] == [(None, None), (Cause.NO_CAPTION, 2)]
    part = all_ranges(store, source)[0]
    assert source.kept_fields(store, part) == [pa.field("n", pa.int64())]


def test_a_disk_that_fails_is_not_told_of_the_captions(folder: Path, store: Store) -> None:
    write_tar(folder, "a.tar", 1)
    pq.write_table(pa.table({"image_id": [1], "caption": ["one"]}), folder / "a.parquet")
    part = all_ranges(store, sa1b(folder))[0]
    with pytest.raises(DataError, match=r"/proc/self/mem cannot be read \("):
        list(sa1b(folder).items(store, part._replace(input="/proc/self/mem")))
    store.put(part.table, b"PAR1 no captions PAR1")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        list(sa1b(folder).items(store, part))


def test_tables_are_inputs_of_their_own(folder: Path, store: Store) -> None:
    write_tar(folder, "a.tar", 1)
    pq.write_table(pa.table({"image_id": [1], "caption": ["one"]}), folder / "a.parquet")
    first = sa1b(folder).inputs(store)
    assert [found.name for found in first] == ["a.parquet", "a.tar"]
    assert not list(sa1b(folder).ranges(store, first[0], 10))
    write_tar(folder, "b.tar", 2)
    pq.write_table(pa.table({"image_id": [2], "caption": ["two"]}), folder / "b.parquet")
    second = sa1b(folder).inputs(store)
    assert set(first) < set(second)
    assert [said(item) for item in all_items(store, sa1b(folder))] == [[("caption", "one")], [("caption", "two")]]


def test_tables_that_do_not_go_together(folder: Path, store: Store) -> None:
    write_tar(folder, "a.tar", 1)
    pq.write_table(pa.table({"image_id": [1], "caption": ["one"], "n": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"image_id": [2], "caption": ["two"], "n": ["x"]}), folder / "b.parquet")
    with pytest.raises(SettingsError, match="`n` is int64 in one table and string in another"):
        all_items(store, sa1b(folder, keep=["n"]))
    with pytest.raises(SettingsError, match="did you mean `caption`"):
        all_items(store, sa1b(folder, captions=["captoin"]))
    with pytest.raises(SettingsError, match="not kept beside it"):
        sa1b(folder, keep=["caption"])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_captions_may_lie_within_structs(folder: Path, store: Store, kind: str) -> None:
    write_tar(folder, "a.tar", 1, 2, 3)
    values: list[Any] = [{"short": "s1", "all": [{"raw": "r1"}, {"raw": "q1"}]}, None, {"short": None, "all": []}]
    rows = [{"at": {"id": number + 1}, "said": value, "two": ["x", "y"]} for number, value in enumerate(values)]
    if kind == "parquet":
        two = pa.array([row.pop("two") for row in rows], pa.list_(pa.string(), 2))
        pq.write_table(pa.Table.from_pylist(rows).append_column("two", two), folder / "c.parquet")
    else:
        (folder / f"c.{kind}").write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    captions = ["said.short", "said.all.raw", "two"]
    items = all_items(store, sa1b(folder, tables=["c.*"], image="at.id", captions=captions))
    both = [("two", "x"), ("two", "y")]
    assert [said(item) for item in items] == [
        [("said.short", "s1"), ("said.all.raw", "r1"), ("said.all.raw", "q1"), *both],
        both,
        both,
    ]


def test_a_damaged_page_of_captions_costs_those_captions(
    folder: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = list(range(1, 401))
    (folder / "a.tar").write_bytes(tar_bytes(*(member(f"{number}.jpg", b"I") for number in numbers)))
    texts = [random.Random(number).randbytes(40).hex() for number in numbers]
    write_pages(folder / "c.parquet", pa.table({"image_id": numbers, "caption": texts}))
    zeroed(folder / "c.parquet", 1, 1)
    items = all_items(store, sa1b(folder))
    lost = [number for number, item in enumerate(items) if problem(item) is Cause.NO_CAPTION]
    assert lost == list(range(lost[0], 200)) and lost[0] > 100
    assert all(not problem(item) for number, item in enumerate(items) if number not in lost)
    assert f"c.parquet: {len(lost)} rows of captions are lost (a damaged page in row group 1)" in caplog.text


def test_packed_tars_are_unpacked(folder: Path, store: Store) -> None:
    (folder / "a.tar.gz").write_bytes(PACKERS[".gz"](tar_bytes(*(member(f"sa_{n}.jpg", b"I%d" % n) for n in (1, 2)))))
    pq.write_table(pa.table({"image_id": [1, 2], "caption": ["one", "two"]}), folder / "c.parquet")
    items = all_items(store, sa1b(folder, tars=["*.tar.gz"], unpack=True))
    assert [(item.image, said(item)) for item in items] == [
        (b"I1", [("caption", "one")]),
        (b"I2", [("caption", "two")]),
    ]

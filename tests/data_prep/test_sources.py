from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import sources
from data_prep.rejections import Cause, Rejection
from data_prep.sources import Input, Range, RawItem, Rows, Source, TableFolder, TextFolder
from data_prep.sources.folders import LocalFolder, StoreFolder
from data_prep.sources.lines import _csv_lines
from data_prep.upkeep.verify import verify
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.shards import SPLIT_DIGITS, sample_key
from infra.store import Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import prepare_here, settings_for, shaded

quick = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def all_items(store: Store, source: sources.Source, rows: int = 100) -> list[RawItem]:
    return [item for part in all_ranges(store, source, rows) for item in source.items(store, part)]


def all_ranges(store: Store, source: sources.Source, rows: int = 100) -> list[sources.Range]:
    found = source.inputs(store)
    return [part for each in found for part in source.ranges(store, each, rows)]


def spans(parts: Sequence[Range]) -> list[tuple[int, int]]:
    """The first row and the number of rows of each range; none may be one of bytes."""
    found = [(part.first, part.rows) for part in parts if isinstance(part, Rows)]
    assert len(found) == len(parts)
    return found


def table_folder(folder: Path, *tables: str, **changes: Any) -> TableFolder:
    plain = {"kind": "table_folder", "name": "s", "url": str(folder), "tables": list(tables)}
    return parse(TableFolder, plain | changes)


def text_folder(folder: Path, **changes: Any) -> TextFolder:
    return parse(TextFolder, {"kind": "text_folder", "name": "s", "url": str(folder)} | changes)


def problem(item: RawItem) -> Cause | None:
    return item.image.cause if isinstance(item.image, Rejection) else None


def said(item: RawItem) -> list[tuple[str, str]]:
    return [(caption["kind"], caption["text"]) for caption in item.captions]


ROWS: list[dict[str, Any]] = [
    {"image": "a.jpg", "caption": "one", "more": ["x", " ", "y"], "n": 1},
    {"image": "b.jpg", "caption": "two, with a comma", "more": None, "n": 2},
    {"image": "c.jpg", "caption": 'say "three"\nthen rest', "more": [], "n": None},
]


@pytest.fixture
def three(folder: Path) -> Path:
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(name.encode())
    return folder


def test_parquet_jsonl_and_csv_give_the_same_items(three: Path, store: Store) -> None:
    plain = [{name: row[name] for name in ("image", "caption", "n")} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(plain), three / "t.parquet", row_group_size=2)
    (three / "t.jsonl").write_text("\n".join(map(json.dumps, plain)))
    with (three / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, plain[0])
        writer.writeheader()
        writer.writerows(plain)
    found = [
        all_items(store, table_folder(three, name, keep=["n"]), rows=2) for name in ("t.parquet", "t.jsonl", "t.csv")
    ]
    for items in found:
        assert [item.name for item in items] == ["a.jpg", "b.jpg", "c.jpg"]
        assert [item.image for item in items] == [b"a", b"b", b"c"]
        assert [item.captions for item in items] == [[{"kind": "caption", "text": r["caption"]}] for r in ROWS]
        assert [item.kept["n"] for item in items] == [1, 2, None]
        assert [item.row for item in items] == [0, 1, 2]


def test_several_caption_columns_and_lists_of_captions(three: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), three / "t.parquet")
    items = all_items(store, table_folder(three, "t.parquet", captions=["more", "caption"]))
    assert [(c["kind"], c["text"]) for c in items[0].captions] == [("more", "x"), ("more", "y"), ("caption", "one")]
    assert [c["kind"] for c in items[1].captions] == ["caption"]


def test_two_tables_may_name_the_same_image(three: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS + ROWS), three / "one.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), three / "two.parquet")
    items = all_items(store, table_folder(three, "one.parquet", "two.parquet"))
    keys = [item.key for item in items]
    assert len(set(keys[:6])) == 6 and keys[6:] == keys[:3], "a piece's keys are distinct; a picture has one in all"
    assert [key[:SPLIT_DIGITS] for key in keys[3:6]] == [key[:SPLIT_DIGITS] for key in keys[:3]]


def test_keys_do_not_depend_on_how_the_rows_are_cut(three: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), three / "t.parquet")
    keys = [[item.key for item in all_items(store, table_folder(three, "t.parquet"), size)] for size in (1, 2, 3)]
    assert keys[0] == keys[1] == keys[2]


def test_licence_and_origin_of_the_source_and_of_the_row(three: Path, store: Store) -> None:
    rows = [
        {"image": "a.jpg", "caption": "x", "own": "MIT", "from": "https://a.example/1"},
        {"image": "b.jpg", "caption": "x", "own": None, "from": " "},
        {"image": "c.jpg", "caption": "x", "own": "x" * 1_000_000, "from": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), three / "t.parquet")
    columns = {"licence": "CC0", "licence_column": "own", "origin": "the web", "origin_column": "from"}
    items = all_items(store, table_folder(three, "t.parquet", **columns))
    assert [item.licence for item in items] == ["MIT", "CC0", "x" * 8192]
    assert [item.origin for item in items] == ["https://a.example/1", "the web", "the web"]


def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "sub").symlink_to(tmp_path)
    (folder / "own.jpg").write_bytes(b"own")
    (folder / "alias.jpg").symlink_to("own.jpg")
    os.mkfifo(folder / "pipe.jpg")
    expected = {
        "../secret.jpg": Cause.OUTSIDE_FOLDER,
        "a/../../secret.jpg": Cause.OUTSIDE_FOLDER,
        str(tmp_path / "secret.jpg"): Cause.OUTSIDE_FOLDER,
        "link.jpg": Cause.OUTSIDE_FOLDER,
        "sub/secret.jpg": Cause.OUTSIDE_FOLDER,
        f"file://{tmp_path}/secret.jpg": Cause.MISSING,
        "own.jpg\0.png": Cause.OUTSIDE_FOLDER,
        "pipe.jpg": Cause.UNREADABLE,
        "": Cause.BAD_NAME,
        "sub": Cause.OUTSIDE_FOLDER,
        ".": Cause.UNREADABLE,
        "x" * 4000: Cause.UNREADABLE,
        "own.jpg": None,
        "alias.jpg": None,
    }
    rows = [{"image": name, "caption": "x"} for name in expected]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    items = all_items(store, table_folder(folder, "t.parquet"))
    assert {item.name: problem(item) for item in items} == expected


def test_bad_captions_are_refused(three: Path, store: Store) -> None:
    texts = [
        b"fine\ttabbed\nlines",
        b"bell\x07",
        b"\xff\xfe",
        b"x" * 1_000_000,
        b"   ",
        b"nul\0",
        b"\xed\xa0\x80",
    ]
    columns = {
        "image": pa.array(["a.jpg"] * len(texts)),
        "caption": pa.Array.from_buffers(pa.utf8(), len(texts), pa.array(texts, pa.binary()).buffers()),
    }
    pq.write_table(pa.table(columns), three / "t.parquet")
    items = all_items(store, table_folder(three, "t.parquet"))
    bad = Cause.BAD_CAPTION
    assert [problem(item) for item in items] == [None, bad, bad, bad, Cause.NO_CAPTION, bad, bad]
    assert all(not item.captions for item in items[1:])


def test_images_alone_need_no_captions(three: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), three / "t.parquet")
    items = all_items(store, table_folder(three, "t.parquet", captions=[]))
    assert [(problem(item), item.captions) for item in items] == [(None, [])] * 3


def test_large_files_are_refused(three: Path, store: Store) -> None:
    (three / "b.jpg").write_bytes(b"12345")
    pq.write_table(pa.Table.from_pylist(ROWS), three / "t.parquet")
    items = all_items(store, table_folder(three, "t.parquet", max_bytes=4))
    assert [problem(item) for item in items] == [None, Cause.TOO_MANY_BYTES, None]


def test_text_folder(folder: Path, store: Store, tmp_path: Path) -> None:
    (folder / "deep").mkdir()
    for name in ("b.jpg", "deep/a.PNG", "c.jpg", "d.jpg"):
        (folder / name).write_bytes(b"image")
    (folder / "b.txt").write_text(" a bee \n")
    (folder / "deep" / "a.txt").write_text("an ay")
    (folder / "c.txt").write_bytes(b"\xff\xff")
    (folder / "notes.md").write_text("not an image")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(b"x")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to("deep")
    (folder / "broken.jpg").symlink_to("nothing.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/bad-\xff.jpg")).write_bytes(b"image")
    found = {item.name: (problem(item), item.captions) for item in all_items(store, text_folder(folder))}
    assert found == {
        "b.jpg": (None, [{"kind": "caption", "text": "a bee"}]),
        "deep/a.PNG": (None, [{"kind": "caption", "text": "an ay"}]),
        "c.jpg": (Cause.BAD_CAPTION, []),
        "d.jpg": (Cause.NO_CAPTION, []),
        "linked": (Cause.OUTSIDE_FOLDER, []),
        "again": (Cause.UNREADABLE, []),
        "broken.jpg": (Cause.NO_CAPTION, []),
        "bad-\\xff.jpg": (Cause.BAD_NAME, []),
    }
    bare = all_items(store, text_folder(folder, caption_suffix=""))
    assert {item.name: problem(item) for item in bare}["broken.jpg"] is Cause.MISSING


def test_other_words_beside_an_image_are_another_input(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"image")
    found = set()
    for text in ("cat", "dog", None):
        if text:
            (folder / "a.txt").write_text(text)
        else:
            (folder / "a.txt").unlink()
        found.add(text_folder(folder).inputs()[0].sha256)
    assert len(found) == 3


def test_a_corpus_in_a_store_gives_the_same_items_as_on_disk(three: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist([*ROWS, {"image": "//x", "caption": "x"}]), three / "t.parquet")
    source = table_folder(three, "t.parquet")
    here, there = LocalFolder(three), StoreFolder(open_store(three.as_uri()))
    for name in ("a.jpg", "none.jpg", "../a.jpg", "/etc/passwd"):
        assert here.read(name, 100) == there.read(name, 100)
    assert there.read("a//b", 100) == Rejection(Cause.BAD_NAME, "'a//b'")
    assert there.read("a.jpg", 0) == Rejection(Cause.TOO_MANY_BYTES)
    assert sorted(file[:3] for file in here.names()) == sorted(file[:3] for file in there.names())
    with there.open("t.parquet") as remote, here.open("t.parquet") as local:
        assert pq.read_table(remote).equals(pq.read_table(local))
    assert source.inputs()[0].sha256 == table_folder(three, "t.parquet", name="other").inputs()[0].sha256
    assert here.find("*.jpg") == there.find("*.jpg") == ["a.jpg", "b.jpg", "c.jpg"]


def test_wrong_columns_are_named_with_the_nearest_right_one(three: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist([{**row, "width": 3, "odd": {"a": 1}} for row in ROWS]), three / "t.parquet")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"captions": ["captoin"]}, "did you mean `caption`"),
        ({"captions": ["n"]}, "is int64, not text"),
        ({"keep": ["width"]}, "the index has its own column `width`"),
        ({"keep": ["odd"]}, "keep columns of numbers"),
        ({"tables": ["none.parquet"]}, "none.parquet cannot be read"),
        ({"tables": ["a.jpg"]}, "is no table"),
        ({"url": str(three / "nowhere")}, "there is no folder"),
    ]
    for changes, message in wrong:
        with pytest.raises(SettingsError) as error:
            all_items(store, table_folder(three, "t.parquet", **changes))
        assert message in str(error.value)


def test_damaged_tables_are_data_errors(three: Path, store: Store) -> None:
    (three / "t.parquet").write_bytes(b"PAR1 nothing")
    (three / "t.jsonl").write_text('{"image": "a.jpg", "caption"')
    for name in ("t.parquet", "t.jsonl"):
        with pytest.raises(DataError, match="not a readable"):
            all_items(store, table_folder(three, name))


def test_a_damaged_line_is_a_row_of_nothing(three: Path, store: Store) -> None:
    good = [json.dumps({"image": f"{name}.jpg", "caption": "fine", "n": 1}).encode() for name in "abc"]
    bad = [
        b'{"image": "a.jpg", "caption"',
        b"[" * 100_000,
        b"[1, 2]",
        b'{"image": "' + b"x" * (5 << 20) + b'"}',
        b'{"image": "\xff.jpg", "caption": "x"}',
        b'{"image": "\\ud800.jpg", "caption": "x"}',
        b'{"image": {"a": 1}, "caption": "x"}',
    ]
    (three / "t.jsonl").write_bytes(b"\n".join([good[0], *bad, b"", good[1], b"\r", good[2]]))
    items = all_items(store, table_folder(three, "t.jsonl", keep=["n"]))
    causes = [*[Cause.BAD_ROW] * 4, *[Cause.BAD_NAME] * 3]
    assert [problem(item) for item in items] == [None, *causes, None, None]
    whys = ["not JSON, or too deep", "not JSON, or too deep", "JSON, but no object", "longer than 4,194,304 characters"]
    assert [item.image for item in items[1:5]] == [Rejection(Cause.BAD_ROW, why) for why in whys]
    assert [item.name for item in items[1:5]] == [f"t.jsonl#{number}" for number in range(1, 5)]
    assert len({item.key for item in items}) == len(items)
    assert [item.row for item in items] == list(range(len(items)))
    assert [item.kept["n"] for item in items] == [1, *[None] * len(bad), 1, 1]


def test_a_damaged_line_of_a_csv_is_a_row_of_nothing(three: Path, store: Store) -> None:
    text = (
        b"\xef\xbb\xbfimage,caption,n\na.jpg,x,1\n\nb.jpg\nb.jpg,x,2,3\n\xff,x,3\n"
        + b"y" * (5 << 20)
        + b"\nc.jpg,\0,4\n"
    )
    (three / "t.csv").write_bytes(text + b'c.jpg,"never closed,5\n')
    items = all_items(store, table_folder(three, "t.csv", keep=["n"]))
    bad = Cause.BAD_ROW
    assert [problem(item) for item in items] == [None, bad, bad, Cause.BAD_NAME, bad, Cause.BAD_CAPTION, bad]
    whys = [item.image.detail for item in items if isinstance(item.image, Rejection) and item.image.cause is bad]
    assert whys == [
        "1 fields, where the table has 3",
        "4 fields, where the table has 3",
        "longer than 4,194,304 characters",
        "not as CSV is written, or with a quote that nobody closes",
    ]
    assert [item.kept["n"] for item in items] == [1, None, None, 3, None, 4, None]


def test_a_quote_that_is_never_closed_takes_no_row_with_it(three: Path, store: Store) -> None:
    def found(*records: str, end: str = "\n") -> list[tuple[str, str]]:
        (three / "t.csv").write_bytes(end.join(["image,caption", *records, ""]).encode())
        items = all_items(store, source)
        return [
            ("", "") if problem(item) is Cause.BAD_ROW else (item.name, " ".join(text for _, text in said(item)))
            for item in items
        ]

    source = table_folder(three, "t.csv")
    good, damaged = [("b.jpg", "fine"), ("c.jpg", "two\nlines")], ("", "")
    rest = ["b.jpg,fine", 'c.jpg,"two\nlines"']
    assert found('a.jpg,"never closed', *rest) == [damaged, *good]
    assert found('"a.jpg","never closed', '"b.jpg","fine"', rest[1]) == [damaged, *good]
    assert found(rest[0], 'a.jpg,"never closed') == [good[0], damaged]
    assert found('a.jpg,"never closed', "", rest[0]) == [damaged, good[0]]
    assert found('a.jpg,"never closed', *rest, end="\r")[:2] == [damaged, good[0]]
    # Read alone they are as they were: of one line, and so nothing can vanish.
    assert found('a.jpg,"say "hi" there"') == [("a.jpg", 'say hi" there"')]
    # The comma would close it, and there are too many fields then.
    assert found('a.jpg,"never closed', 'b.jpg,",",x', rest[0]) == [damaged, damaged, good[0]]


def test_records_and_lines_are_bounded(three: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.lines.LONGEST_LINE", 50)
    bad = Cause.BAD_ROW
    for end in ("\n", "\r\n", "\r"):
        for length in range(45, 55):  # the limit falls before, between and behind the halves of a line's end
            text = end.join(["image,caption", "a.jpg," + "x" * (length - 6), "b.jpg,fine", ""])
            (three / "t.csv").write_bytes(text.encode())
            items = all_items(store, table_folder(three, "t.csv"))
            assert [problem(item) for item in items] == [bad if length > 49 else None, None], (end, length)
    spanning = 'b.jpg,"one\ntwo\nthree"'
    long = 'a.jpg,"' + "a line of it\n" * 5 + '"'
    (three / "t.csv").write_text("\n".join(["image,caption", spanning, long, spanning, 'a.jpg,"x', "y" * 90, spanning]))
    items = all_items(store, table_folder(three, "t.csv"))
    assert [problem(item) for item in items] == [None, *[bad] * 6, None, bad, bad, None]


@pytest.mark.parametrize("line", ['x","', '"","', ',"""', '"'])
def test_no_csv_is_read_over_and_over(line: str) -> None:
    """Every line could begin a record that goes on for ever."""
    began = time.process_time()
    count = 300_000
    rows = sum(1 for _ in _csv_lines(io.BytesIO(b"a,b\n" + f"{line}\n".encode() * count), "t.csv"))
    assert count // 2 <= rows <= count
    assert time.process_time() - began < 20  # a second, where to read on from the next line would take hours


@quick
@given(
    rows=st.lists(st.tuples(*[st.text('a",\n\r ', max_size=6)] * 2), max_size=6),
    at=st.integers(0, 6),
    broken=st.text('a",\n', max_size=12),
)
def test_any_csv(rows: list[tuple[str, str]], at: int, broken: str) -> None:
    """What a writer writes is read back; something broken takes no line with it, and reading twice gives the same."""

    def written(rows: list[tuple[str, str]]) -> str:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
        return text.getvalue()

    def read(text: str) -> list[Any]:
        return list(_csv_lines(io.BytesIO(text.encode()), "t.csv"))

    assert read("x,y\n" + written(rows)) == [{"x": x, "y": y} for x, y in rows]
    before, behind = rows[:at], written([("last", "one")])
    text = "x,y\n" + written(before) + broken.replace("\n", "") + "\n" + behind
    found = read(text)
    assert found == read(text)
    assert found[: len(before)] == [{"x": x, "y": y} for x, y in before]
    assert found[-1] == {"x": "last", "y": "one"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.jsonl", ""),
        ("t.jsonl", "\n \n\r\n"),
        ("t.csv", "image,caption\n"),
        ("t.csv", "\ufeffimage,caption"),
        ("t.csv", "image"),
        ("t.csv", ""),
        ("t.csv", "\n\n"),
    ],
)
def test_a_table_without_rows_is_an_input_without_pieces(three: Path, store: Store, name: str, text: str) -> None:
    (three / name).write_text(text)
    pq.write_table(pa.Table.from_pylist(ROWS), three / "t.parquet")
    source = table_folder(three, name, "t.parquet", keep=["n"])
    assert len(source.inputs(store)) == 2
    assert [part.input for part in all_ranges(store, source)] == ["t.parquet"]


@pytest.mark.parametrize("table", [pa.Table.from_pylist(ROWS)[:0], pa.table({}), pa.table({"image": pa.nulls(0)})])
def test_a_parquet_without_rows_is_an_input_without_pieces(three: Path, store: Store, table: pa.Table) -> None:
    pq.write_table(table, three / "t.parquet")
    assert all_ranges(store, table_folder(three, "t.parquet", keep=["n"])) == []


def test_columns_without_a_value_are_taken(three: Path, store: Store) -> None:
    nothing, lists = pa.nulls(3), pa.array([None, [], [None]], pa.list_(pa.null()))
    columns = {"image": ["a.jpg", "b.jpg", "c.jpg"], "n": nothing, "l": nothing, "o": nothing, "k": lists}
    pq.write_table(pa.table(columns | {"caption": ["x"] * 3, "more": nothing, "most": lists}), three / "t.parquet")
    changes = {"licence_column": "l", "licence": "CC0", "origin_column": "o", "keep": ["n", "k"]}
    source = table_folder(three, "t.parquet", captions=["more", "caption", "most"], **changes)
    items = all_items(store, source)
    assert [(problem(item), said(item), item.licence) for item in items] == [(None, [("caption", "x")], "CC0")] * 3
    part = all_ranges(store, source)[0]
    schema = pa.schema(source.kept_fields(store, part))
    assert schema == pa.schema([("n", pa.null()), ("k", pa.list_(pa.field("element", pa.null())))])
    # Beside other tables, in which there are values, they are what those are.
    other = pa.schema([("n", pa.int64()), ("k", pa.list_(pa.string()))])
    both = pa.unify_schemas([schema, other], promote_options="permissive")
    assert (both.field("n").type, both.field("k").type.value_type) == (pa.int64(), pa.string())
    rows = pa.Table.from_pylist([item.kept for item in items], schema=schema)
    assert rows.cast(both)["k"].to_pylist() == [None, [], [None]]
    none = table_folder(three, "t.parquet", image="n", captions=[])
    assert [problem(item) for item in all_items(store, none)] == [Cause.BAD_NAME] * 3
    assert [problem(item) for item in all_items(store, table_folder(three, "t.parquet", captions=["more"]))] == [
        Cause.NO_CAPTION
    ] * 3


def test_captions_of_jsonl_may_be_texts_lists_or_numbers(three: Path, store: Store) -> None:
    values = ["one", ["two", None, "three"], 4, None, {"a": "b"}, "bell\x07", "x" * 1_000_000]
    (three / "t.jsonl").write_text("\n".join(json.dumps({"image": "a.jpg", "caption": value}) for value in values))
    items = all_items(store, table_folder(three, "t.jsonl"))
    expected = [["one"], ["two", "three"], ["4"], [], ["b"], [], []]
    assert [[text for _, text in said(item)] for item in items] == expected
    bad = Cause.BAD_CAPTION
    assert [problem(item) for item in items] == [None, None, None, Cause.NO_CAPTION, None, bad, bad]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 3], [1, None, 3]),
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([True, None, False], [True, None, False]),
        (["a", None, "b"], ["a", None, "b"]),
        ([1, "b", None], ["1", "b", None]),
        ([1, True, None], ["1", "true", None]),
        ([["a"], [], None], [["a"], [], None]),
        ([1, [], {"x": 2}], ["1", "[]", '{"x": 2}']),
        ([2**63, 1, -1], [str(2**63), "1", "-1"]),
        ([10**400, 1.5, 2], [str(10**400), "1.5", "2"]),
        ([None, None, None], [None, None, None]),
        (["\ud800", "x", None], ["?", "x", None]),
    ],
)
def test_a_kept_column_of_jsonl_has_one_type(three: Path, store: Store, values: list[Any], expected: list[Any]) -> None:
    rows = [json.dumps({"image": f"{name}.jpg", "v": value}) for name, value in zip("abc", values, strict=True)]
    (three / "t.jsonl").write_text("\n".join(rows))
    source = table_folder(three, "t.jsonl", captions=[], keep=["v"])
    part = all_ranges(store, source)[0]
    found = [item.kept["v"] for item in source.items(store, part)]
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]
    pa.array(found, source.kept_fields(store, part)[0].type)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "", "3"], [1, None, 3]),
        (["1", "2.5", ""], [1.0, 2.5, None]),
        (["true", "", "FALSE"], [True, None, False]),
        (["1_000", "2", ""], ["1_000", "2", ""]),
        (["1", "x", ""], ["1", "x", ""]),
        (["", "", ""], [None, None, None]),
        (["2020-01-02", "", ""], ["2020-01-02", "", ""]),
    ],
)
def test_a_kept_column_of_csv_has_one_type(three: Path, store: Store, values: list[str], expected: list[Any]) -> None:
    (three / "t.csv").write_text("v,image\n" + "".join(f"{value},a.jpg\n" for value in values))
    items = all_items(store, table_folder(three, "t.csv", captions=[], keep=["v"]))
    assert [item.kept["v"] for item in items] == expected


def test_types_do_not_depend_on_where_a_value_stands(three: Path, store: Store) -> None:
    rows = [{"image": "a.jpg", "caption": "x", "v": 1}] * 20_000 + [{"image": "a.jpg", "caption": "x", "v": 0.5}]
    (three / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = table_folder(three, "t.jsonl", keep=["v"])
    parts = all_ranges(store, source, 15_000)
    assert spans(parts) == [(0, 15_000), (15_000, 5_001)]
    assert [source.kept_fields(store, part)[0].type for part in parts] == [pa.float64()] * 2


MEASURE = """
import resource, sys
from data_prep.sources import UrlList
from infra.store import open_store
folder, store = sys.argv[1], open_store(sys.argv[2])
source = UrlList(kind="url_list", name="s", url=folder, tables=["*.*"], captions=["a", "b"], keep=["n"])
count = 0
for found in source.inputs(store):
    for part in source.ranges(store, found, 50_000):
        read = source.urls if part.first else source.items
        count += sum(1 for _ in read(store, part))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_a_table(tmp_path: Path) -> None:
    used = {}
    for count in (20_000, 200_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        with (folder / "t.jsonl").open("w") as file:
            for n in range(count):
                row = {
                    "url": f"https://host.example/{n}.jpg",
                    "a": f"number {n} " * 10,
                    "b": [f"{n}", "x" * 80],
                    "n": n,
                }
                file.write(json.dumps(row) + "\n")
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "store")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found, used[count] = map(int, ran.stdout.split())
        assert found == count
    assert used[200_000] - used[20_000] < 40, used  # MiB; the table itself has 55, and more as Python objects


class Shades(Source):
    """Pictures that nobody has stored: all that another kind of source takes."""

    kind: Literal["shades"] = "shades"
    count: int = 5

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        return [Input("shades", self.count, "0" * 64)]

    def ranges(self, store: Store, found: Input, rows: int) -> Iterator[Range]:
        for first in range(0, found.size, rows):
            yield Rows(found.name, "", True, first, min(rows, found.size - first))

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Rows)
        for number in range(part.first, part.first + part.rows):
            image, said = zoo.saved(shaded(number, 40), "PNG"), [{"kind": "caption", "text": f"shade {number}"}]
            yield RawItem(number, sample_key(self.name, str(number)), str(number), image, said, "", "", {})


def test_another_kind_of_source_is_one_class(tmp_path: Path) -> None:
    store, settings = open_store(str(tmp_path / "store")), settings_for(tmp_path, sizes=[16], rows_per_shard=2)
    settings = settings.model_copy(update={"sources": [Shades(name="mine", url="")]})
    plan = prepare_here(store, settings)
    records = list(plan.records(store, "16"))
    assert [(record.accepted, record.rejected) for record in records] == [(2, {}), (2, {}), (1, {})]
    assert verify(store, plan.digest, plan.edition).problems == []

"""Tables of text in every shape that they come in: packed, arrays of JSON, TSV, without a header; and damaged ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.rejections import Cause, Rejection
from data_prep.sources import RawItem, json_array, packed
from data_prep.sources.folders import open_folder
from data_prep.sources.json_array import Elements
from data_prep.sources.lines import lines
from infra.errors import DataError, SettingsError
from infra.store import Store
from tests.data_prep.corpora import HUGGING_FACE_IMAGE, write_as_datasets
from tests.data_prep.test_sources import all_items, all_ranges, problem, said, table_folder
from tests.data_prep.test_sources_tables import parquet_images, url_list

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def zstd(data: bytes) -> bytes:
    """In frames, as packers write that work side by side."""
    frames = [data[start : start + 50_000] for start in range(0, len(data), 50_000)]
    return b"".join(pa.compress(frame, "zstd", asbytes=True) for frame in frames)


def bzip2(data: bytes) -> bytes:
    return bz2.compress(data, 1)


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bzip2, ".zst": zstd}

ROWS: list[dict[str, Any]] = [
    {"url": f"https://host.example/{n}.jpg", "caption": said, "n": n}
    for n, said in enumerate(["one", 'say "two", [and] {three}', "é\\", "four", "five"])
]


def written(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind in (".csv", ".tsv"):
        comma = "," if kind == ".csv" else "\t"
        quoted = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
        text = [comma.join(rows[0]), *(comma.join(f'"{value}"' for value in row) for row in quoted)]
        return "\n".join(text).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    return "\n".join(map(json.dumps, rows)).encode()


KINDS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv"]


@pytest.mark.parametrize("packing", ["", *PACKERS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_read_however_it_is_written(folder: Path, store: Store, kind: str, packing: str) -> None:
    data = written(kind, ROWS)
    name = f"t{kind}{packing}".upper() if packing == ".gz" else f"t{kind}{packing}"
    (folder / name).write_bytes(PACKERS[packing](data) if packing else data)
    items = all_items(store, url_list(folder, name, keep=["n"]), rows=2)
    assert [item.image for item in items] == [row["url"] for row in ROWS]
    assert [said(item) for item in items] == [[("caption", row["caption"])] for row in ROWS]
    assert [item.kept["n"] for item in items] == list(range(5))


def test_packed_files_of_several_parts_are_one(folder: Path, store: Store) -> None:
    """As `cat a.gz b.gz` and parallel packers write them."""
    half = [b"\n".join([json.dumps(row).encode() for row in part] + [b""]) for part in (ROWS[:2], ROWS[2:])]
    for packing, pack in PACKERS.items():
        (folder / f"t.jsonl{packing}").write_bytes(pack(half[0]) + pack(half[1]))
        assert len(all_items(store, url_list(folder, f"t.jsonl{packing}"))) == 5


def numbered(count: int) -> list[dict[str, Any]]:
    noise = random.Random(5)
    return [{"url": f"https://host.example/{noise.getrandbits(200):x}.jpg", "caption": f"c {n}"} for n in range(count)]


BREAKS = "the packed file is damaged, or breaks off here"


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_where_a_packed_table_breaks_off_the_rest_is_one_row(
    folder: Path, store: Store, kind: str, packing: str
) -> None:
    rows = numbered(6000)
    data = PACKERS[packing](written(kind, rows))
    source = url_list(folder, f"t{kind}{packing}")
    (folder / f"t{kind}{packing}").write_bytes(data[: len(data) // 2])
    items = all_items(store, source, 5000)
    assert 1000 < len(items) < 5000
    assert [item.image for item in items[:-1]] == [row["url"] for row in rows[: len(items) - 1]]
    assert items[-1].image == Rejection(Cause.BAD_ROW, BREAKS)
    assert all_items(store, source, 5000) == items, "twice the same"


def test_a_cut_line_of_a_packed_table_is_not_taken_for_a_whole_one(folder: Path, store: Store) -> None:
    """Without its end a line of CSV still looks like one."""
    text = b"url,caption\nhttps://host.example/1.jpg,a dog\nhttps://host.example/2.jpg,a large dog and a cat"
    pack = gzip.compress(text)
    for cut in range(1, 40):
        (folder / "t.csv.gz").write_bytes(pack[:-cut])
        try:
            items = all_items(store, url_list(folder, "t.csv.gz"))
        except DataError:  # not even the header is left
            continue
        assert {text for item in items for _, text in said(item)} <= {"a dog"}
        assert items[-1].image == Rejection(Cause.BAD_ROW, BREAKS)


def test_what_is_called_packed_and_is_not(folder: Path, store: Store) -> None:
    for packing in PACKERS:
        (folder / f"t.jsonl{packing}").write_bytes(written(".jsonl", ROWS))
        with pytest.raises(DataError, match="no row in it can be read"):
            all_items(store, url_list(folder, f"t.jsonl{packing}"))


def test_a_bomb_is_left_where_it_goes_off(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "IN_ANY_CASE", 8 << 20)
    zeros = gzip.compress(bytes(1 << 20)) * 10_000  # ten gigabytes
    (folder / "t.jsonl.gz").write_bytes(gzip.compress(written(".jsonl", ROWS) + b"\n") + zeros)
    began = time.process_time()
    items = all_items(store, url_list(folder, "t.jsonl.gz"))
    assert time.process_time() - began < 20
    assert [problem(item) for item in items] == [*[None] * 5, Cause.BAD_ROW]
    [part] = all_ranges(store, url_list(folder, "t.jsonl.gz"))
    assert (store.size(part.table) or 0) < 10_000


# Arrays of JSON


def elements(data: bytes, longest: int = 1 << 20) -> tuple[list[bytes | None], str]:
    file = io.BytesIO(data)
    assert file.read(1) == b"["
    found = Elements(file, longest)
    return list(found), found.broken


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\{}[],:\n é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\{', max_size=3), inner, max_size=3),
    max_leaves=12,
)


@quick
@given(
    rows=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 0, 2]), plain=st.booleans(), read=st.integers(1, 9)
)
def test_any_array_comes_apart_as_it_was_put_together(
    rows: list[Any], indent: int | None, plain: bool, read: int
) -> None:
    data = json.dumps(rows, indent=indent, ensure_ascii=plain).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "READ", read)
        found, broken = elements(data)
    assert [json.loads(element or b"") for element in found] == rows and not broken


DAMAGE = [
    '{"image": "a.jpg, "caption": "x"}',
    '{"image": "a.jpg", "caption": "x"',
    '{"image": "a.jpg", "caption": "x}',
    '{"image": "a.jpg" "caption": "x"}',
    '"image": 1}',
    '{"image": {"a": 1, "caption": "x"}',
    "nonsense",
    "}",
    '{"a": "x\\',
    "[1, 2]",
    '{"image": "' + "x" * 300 + '"}',
]


@pytest.mark.parametrize("read", [1, 7, 1 << 20])
@pytest.mark.parametrize("bad", DAMAGE)
def test_a_damaged_element_is_a_row_of_nothing(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, bad: str, read: int
) -> None:
    monkeypatch.setattr(json_array, "READ", read)
    monkeypatch.setattr("data_prep.sources.lines.LONGEST_LINE", 200)
    good = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (folder / "t.json").write_text("\ufeff [\n" + ",\n".join([*good[:2], bad, *good[2:]]) + "\n]\n")
    items = all_items(store, url_list(folder, "t.json", keep=["n"]))
    assert [problem(item) for item in items] == [None, None, Cause.BAD_ROW, None, None, None]
    assert [item.kept["n"] for item in items] == [0, 1, None, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "count", "why"),
    [
        ("[]", 0, ""),
        ("[1, {},]", 2, ""),
        ("[1]  \n", 1, ""),
        ("[1] x", 1, "more behind the end of the array"),
        ("[1, 2", 1, "the array breaks off here"),
        ('["a', 0, "the array breaks off here"),
        ('[1, {"a": 2}\n', 2, "the array breaks off here"),
        ("[", 0, "the array breaks off here"),
        ("[" * 10_000, 0, "the array breaks off here"),
    ],
)
def test_the_end_of_an_array(text: str, count: int, why: str) -> None:
    found, broken = elements(text.encode())
    assert (len(found), broken) == (count, why)


def test_an_array_takes_no_more_memory_than_its_largest_element() -> None:
    class Long(io.RawIOBase):
        """Forty megabytes of a text, then an element."""

        left = 40

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.left -= 1
            says = {39: b'"', 0: b'", 5]'}.get(self.left, b"x")
            buffer[:] = says.ljust(len(buffer), b"x" if self.left else b" ")
            return len(buffer) if self.left >= 0 else 0

    file = io.BufferedReader(Long(), 1 << 20)
    found = Elements(file, 1 << 20)
    tracemalloc.start()
    assert list(found) == [None, b"5"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_lines_of_json_may_be_called_json(folder: Path, store: Store) -> None:
    (folder / "t.json").write_bytes(b"\xef\xbb\xbf\n" + written(".jsonl", ROWS))
    assert len(all_items(store, url_list(folder, "t.json"))) == 5


@pytest.mark.parametrize("text", ['{\n "images": [],\n "annotations": []\n}', "nonsense", '"text"', "{"])
def test_other_json_is_no_table(folder: Path, store: Store, text: str) -> None:
    (folder / "t.json").write_text(text)
    with pytest.raises(DataError, match="neither an array of rows nor a row a line"):
        all_items(store, url_list(folder, "t.json"))


@pytest.mark.parametrize("text", ["", " \n", "[]", "\ufeff[\n]"])
def test_json_without_rows_is_an_input_without_pieces(folder: Path, store: Store, text: str) -> None:
    (folder / "t.json").write_text(text)
    assert all_ranges(store, url_list(folder, "t.json")) == []


# CSV and TSV


def test_a_tsv_has_tabs_between_its_fields_and_commas_within(folder: Path, store: Store) -> None:
    (folder / "t.tsv").write_text(
        'url\tcaption\nhttps://h.example/1.jpg\ta, b "and" c\nhttps://h.example/2.jpg\t"q"\tx\n'
    )
    items = all_items(store, url_list(folder, "t.tsv"))
    assert [said(item) for item in items] == [[("caption", 'a, b "and" c')], []]
    assert items[1].image == Rejection(Cause.BAD_ROW, "3 fields, where the table has 2")


def test_the_names_of_columns_may_be_told(folder: Path, store: Store) -> None:
    """Conceptual 12M begins with its first row."""
    (folder / "cc12m.tsv").write_text("https://h.example/1.jpg\tone\nhttps://h.example/2.jpg\ttwo\n")
    items = all_items(store, url_list(folder, "cc12m.tsv", header=["url", "caption"]))
    assert [(item.image, said(item)) for item in items] == [
        ("https://h.example/1.jpg", [("caption", "one")]),
        ("https://h.example/2.jpg", [("caption", "two")]),
    ]


def test_columns_that_a_table_names_itself_are_not_told(folder: Path) -> None:
    (folder / "t.jsonl").write_bytes(written(".jsonl", ROWS))
    with pytest.raises(SettingsError, match=r"t.jsonl names its columns itself: leave `header` out"):
        url_list(folder, "t.jsonl", header=["url", "caption"]).inputs()


# Texts within values

NESTED: list[dict[str, Any]] = [
    {"said": {"short": "s0", "long": "l0"}, "all": [{"raw": "r0", "words": ["r"]}, {"raw": "q0", "words": []}]},
    {"said": {"short": None, "long": "l1"}, "all": []},
    {"said": None, "all": None},
]
STRUCT = pa.struct([("short", pa.string()), ("long", pa.large_string())])
LISTS = pa.list_(pa.struct([("raw", pa.string()), ("words", pa.list_(pa.string()))]))


def nested(folder: Path, kind: str) -> str:
    rows = [{"image": f"{n}.jpg", **row} for n, row in enumerate(NESTED)]
    for row in rows:
        (folder / row["image"]).write_bytes(b"I")
    if kind == ".parquet":
        schema = pa.schema([("image", pa.string()), ("said", STRUCT), ("all", LISTS)])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "t.parquet")
    else:
        (folder / f"t{kind}").write_bytes(written(kind, rows))
    return f"t{kind}"


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["said.short"], [[("said.short", "s0")], [], []]),
        (["said.long", "said.short"], [[("said.long", "l0"), ("said.short", "s0")], [("said.long", "l1")], []]),
        (["said"], [[("said", "s0"), ("said", "l0")], [("said", "l1")], []]),
        (["all.raw"], [[("all.raw", "r0"), ("all.raw", "q0")], [], []]),
        (["all.1.raw"], [[("all.1.raw", "q0")], [], []]),
        (["all.words"], [[("all.words", "r")], [], []]),
    ],
)
def test_captions_within_structs(
    folder: Path, store: Store, kind: str, captions: list[str], expected: list[list[tuple[str, str]]]
) -> None:
    items = all_items(store, table_folder(folder, nested(folder, kind), captions=captions))
    assert [said(item) for item in items] == expected
    assert [problem(item) for item in items] == [None if caption else Cause.NO_CAPTION for caption in expected]


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_other_columns_may_lie_within_structs(folder: Path, store: Store, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"at": {"url": f"https://h.example/{n}.jpg", "n": n}, "c": "x", "l": [{"w": "a"}, {"w": "b"}]} for n in range(3)
    ]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    else:
        (folder / "t.jsonl").write_bytes(written(kind, rows))
    source = url_list(folder, f"t{kind}", image="at.url", captions=["c"], keep=["at.n", "l.w"], licence_column="c")
    items = all_items(store, source)
    assert [item.image for item in items] == [row["at"]["url"] for row in rows]
    assert [item.kept for item in items] == [{"at.n": n, "l.w": ["a", "b"]} for n in range(3)]
    [part] = all_ranges(store, source)
    assert [url for _, url in source.urls(store, part)] == [item.image for item in items]
    fields = source.kept_fields(store, part)
    assert [field.type for field in fields] == [pa.int64(), pa.list_(pa.string())]


def test_a_field_that_a_struct_has_not_is_told_of(folder: Path, store: Store) -> None:
    name = nested(folder, ".parquet")
    with pytest.raises(SettingsError, match=r"has no column `said.shrot`: did you mean `said.short`"):
        all_items(store, table_folder(folder, name, captions=["said.shrot"]))
    pq.write_table(pa.table({"image": ["0.jpg"], "c": [{"raw": "x", "id": 5}]}), folder / "t.parquet")
    with pytest.raises(SettingsError, match=r"not text alone: name what is text in it: c.raw"):
        all_items(store, table_folder(folder, "t.parquet", captions=["c"]))
    name = nested(folder, ".jsonl")
    with pytest.raises(SettingsError, match=r"has no column `said.shrot`"):
        all_items(store, table_folder(folder, name, captions=["said.shrot"]))


LIST_KINDS = [
    pa.list_(pa.string(), 2),
    pa.list_view(pa.string()),
    pa.large_list_view(pa.string()),
    pa.large_list(pa.large_string()),
]


@pytest.mark.parametrize("kind", LIST_KINDS)
def test_lists_of_every_kind(folder: Path, store: Store, kind: pa.DataType) -> None:
    (folder / "a.jpg").write_bytes(b"I")
    column = pa.array([["one", "two"], None, ["three", None]], kind)
    pq.write_table(pa.table({"image": ["a.jpg"] * 3, "caption": column, "kept": column}), folder / "t.parquet")
    items = all_items(store, table_folder(folder, "t.parquet", keep=["kept"]))
    assert [[text for _, text in said(item)] for item in items] == [["one", "two"], [], ["three"]]
    assert [item.kept["kept"] for item in items] == [["one", "two"], None, ["three", None]]


def test_texts_in_structs_need_not_be_text(folder: Path, store: Store) -> None:
    bad = pa.Array.from_buffers(pa.utf8(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    image = pa.StructArray.from_arrays([pa.array([b"picture"], pa.binary()), bad], ["bytes", "path"])
    said = pa.StructArray.from_arrays([bad], ["text"])
    pq.write_table(pa.table({"image": image, "caption": ["x"], "said": said}), folder / "t.parquet")
    [item] = all_items(store, parquet_images(folder, "t.parquet"))
    assert (item.name, item.image) == ("t.parquet#0", b"picture")
    [item] = all_items(store, parquet_images(folder, "t.parquet", captions=["said.text"]))
    assert problem(item) is Cause.BAD_CAPTION


# What Hugging Face's library writes


def pictures(*data: bytes | None) -> pa.Array:
    values = [{"bytes": one, "path": f"{n}.jpg"} for n, one in enumerate(data)]
    return pa.array(values, HUGGING_FACE_IMAGE)


def test_shards_of_datasets_are_read(folder: Path, store: Store) -> None:
    """Image() and Image(decode=False) are stored alike; captions as List(Value), of a length, or in objects."""
    info = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    for part in range(2):
        numbers = range(3 * part, 3 * part + 3)
        columns = {
            "image": pictures(*(b"picture %d" % n for n in numbers)),
            "captions": pa.array([[f"one {n}", f"two {n}"] for n in numbers], pa.list_(pa.string(), 2)),
            "sentences": [[{"raw": f"raw {n}", "tokens": ["x"], "sentid": n}] for n in numbers],
            "label": pa.array([n % 2 for n in numbers], pa.int64()),
        }
        name = f"train-{part:05d}-of-00002.parquet"
        write_as_datasets(folder / "data" / name, pa.table(columns), info, row_group_size=2)
    source = parquet_images(folder, "data/train-*.parquet", captions=["captions", "sentences.raw"], keep=["label"])
    items = all_items(store, source, 2)
    assert [item.image for item in items] == [b"picture %d" % n for n in range(6)]
    assert [[text for _, text in said(item)] for item in items] == [
        [f"one {n}", f"two {n}", f"raw {n}"] for n in range(6)
    ]
    assert [item.kept["label"] for item in items] == [n % 2 for n in range(6)]


def test_paths_alone_of_datasets_are_read(folder: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "1.jpg").write_bytes(b"one")
    values = [{"bytes": None, "path": str(tmp_path / "files" / f"{n}.jpg")} for n in (1, 2)]
    columns = {"image": pa.array(values, HUGGING_FACE_IMAGE), "text": ["x", "y"]}
    write_as_datasets(folder / "t.parquet", pa.table(columns), {"image": {"_type": "Image"}})
    items = all_items(store, parquet_images(folder, "t.parquet", captions=["text"], files=str(tmp_path / "files")))
    assert [(item.image if isinstance(item.image, bytes) else problem(item)) for item in items] == [
        b"one",
        Cause.MISSING,
    ]


def test_a_list_of_pictures_is_told_of_and_one_can_be_named(folder: Path, store: Store) -> None:
    values = [[{"bytes": b"%d" % n, "path": None}, {"bytes": b"x", "path": None}] for n in range(3)]
    table = pa.table({"images": pa.array(values, pa.list_(HUGGING_FACE_IMAGE)), "text": ["a", "b", "c"]})
    pq.write_table(table, folder / "t.parquet")
    with pytest.raises(SettingsError, match=r"of a list of images, one: images.0"):
        all_items(store, parquet_images(folder, "t.parquet", image="images", captions=["text"]))
    items: list[RawItem] = all_items(store, parquet_images(folder, "t.parquet", image="images.0", captions=["text"]))
    assert [item.image for item in items] == [b"0", b"1", b"2"]


# What no source reads


def test_mosaics_shards_are_refused_with_a_word_on_how_to_convert_them(folder: Path, store: Store) -> None:
    (folder / "shard.00000.mds").write_bytes(bytes(64))
    (folder / "shard.00000.mds.zstd").write_bytes(bytes(64))
    for name in ("shard.00000.mds", "shard.00000.mds.zstd"):
        for source in (url_list(folder, name), parquet_images(folder, name)):
            with pytest.raises(SettingsError, match=r"is no table: .*StreamingDataset.*ShardWriter"):
                source.inputs()
    (folder / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(SettingsError, match="is no table: write it as CSV"):
        list(lines(open_folder(str(folder)), "t.xlsx"))

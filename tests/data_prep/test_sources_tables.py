"""Tables of URLs, tables that hold their images, and what a table's identity is made of."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.rejections import Cause, Rejection
from data_prep.sources import ROW, ParquetImages, RawItem, Rows, Source, Url, UrlList
from data_prep.sources.base import Keys
from data_prep.sources.tables import cuts
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.shards import SPLIT_DIGITS, sample_key
from infra.store import Store, open_store
from tests.data_prep.test_sources import all_items, all_ranges, problem, said, spans, table_folder

quick = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def url_list(folder: Path, *tables: str, **changes: Any) -> UrlList:
    return parse(UrlList, {"kind": "url_list", "name": "s", "url": str(folder), "tables": list(tables)} | changes)


def parquet_images(folder: Path, *tables: str, **changes: Any) -> ParquetImages:
    plain = {"kind": "parquet_images", "name": "s", "url": str(folder), "tables": list(tables)}
    return parse(ParquetImages, plain | changes)


# Lists of URLs

URLS = [
    {
        "link": f"https://host.example/{n}.jpg",
        "short": f"s{n}",
        "long": None if n else [f"l{n}", "m"],
        "own": "MIT",
        "n": n,
    }
    for n in range(4)
]


def test_a_list_of_urls(folder: Path, store: Store) -> None:
    (folder / "deep").mkdir()
    pq.write_table(pa.Table.from_pylist(URLS), folder / "deep" / "t.parquet", row_group_size=3)
    (folder / "deep" / "t.jsonl").write_text("\n".join(map(json.dumps, URLS)))
    changes = {"image": "link", "captions": ["short", "long"], "keep": ["n"], "licence_column": "own"}
    source = url_list(folder, "**/*.parquet", "*/*.jsonl", **changes)
    items = all_items(store, source, rows=3)
    assert [found.name for found in source.inputs()] == ["deep/t.parquet", "deep/t.jsonl"]
    assert all(isinstance(item.image, Url) for item in items)
    assert [item.image for item in items] == [row["link"] for row in URLS] * 2
    assert [item.origin for item in items] == [row["link"] for row in URLS] * 2
    assert said(items[0]) == said(items[4]) == [("short", "s0"), ("long", "l0"), ("long", "m")]
    assert [(item.row, item.kept, item.licence) for item in items] == [(n, {"n": n}, "MIT") for n in range(4)] * 2
    keys = [item.key for item in items]
    assert len(set(keys[:4])) == 4 and keys[4:] == keys[:4], "whatever table names them"


# What an item is by itself, and what rows of it look like in a table of each kind
NAMED = st.lists(st.text("ab /é", max_size=3), max_size=8)


def tables_of(kind: str, folder: Path, table: str, names: list[str]) -> Source:
    if kind == "parquet_images":
        pq.write_table(pa.table({"image": pa.array([n.encode() for n in names], pa.binary())}), folder / table)
        return parquet_images(folder, table, captions=[])
    if kind == "url_list":
        pq.write_table(pa.table({"url": pa.array(names, pa.string())}), folder / table)
        return url_list(folder, table, captions=[])
    pq.write_table(pa.table({"image": pa.array(names, pa.string())}), folder / table)
    return table_folder(folder, table, captions=[])


@pytest.mark.parametrize("kind", ["table_folder", "url_list", "parquet_images"])
@quick
@given(before=NAMED, names=NAMED)
def test_neither_rows_in_front_nor_a_tables_name_move_a_key(
    tmp_path: Path, kind: str, before: list[str], names: list[str]
) -> None:
    store, folder = open_store(str(tmp_path / "store")), tmp_path / "any"
    folder.mkdir(exist_ok=True)
    first = all_items(store, tables_of(kind, folder, "a.parquet", names))
    again = all_items(store, tables_of(kind, folder, "b.parquet", before + names))
    assert len(again) == len(before) + len(names)
    assert len({item.key for item in again}) == len(again)
    new = {name.strip() if kind == "url_list" else name for name in before}
    for name, one, other in zip(names, first, again[len(before) :], strict=True):
        name = name.strip() if kind == "url_list" else name
        if name not in new and (name or kind == "parquet_images"):
            assert one.key == other.key
        elif name:
            assert one.key[:SPLIT_DIGITS] == other.key[:SPLIT_DIGITS], "on one side of the held-out split"


def test_repeats_have_keys_of_their_own_that_begin_alike(folder: Path, store: Store) -> None:
    url = "https://host.example/a.jpg"
    rows = [{"url": named} for named in [url, f" {url}\n", "https://host.example/b.jpg", url, None, None]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    keys = [item.key for item in all_items(store, url_list(folder, "t.parquet", captions=[]))]
    assert len(set(keys)) == 6 and all(len(key) == 20 for key in keys)
    assert len({key[:SPLIT_DIGITS] for key in (keys[0], keys[1], keys[3])}) == 1
    assert len({key[:SPLIT_DIGITS] for key in keys}) == 4
    assert keys[0] == sample_key("s", url) and keys[4] == sample_key("s", "\0t.parquet#4")


def test_a_key_that_was_given_out_is_not_given_out_again() -> None:
    keys = Keys()
    first = [keys.distinct("a" * 20) for _ in range(3)]
    assert len({*first, keys.distinct(first[1]), keys.distinct(first[2]), keys.distinct("a" * 20)}) == 6


def test_nothing_is_called_like_the_place_of_another_item(folder: Path, store: Store) -> None:
    pq.write_table(pa.table({"image": [None, "\0t.parquet#0", "t.parquet#0"]}), folder / "t.parquet")
    items = all_items(store, table_folder(folder, "t.parquet", captions=[]))
    assert [item.key for item in items] == [
        sample_key("s", "\0t.parquet#0"),
        sample_key("s", "\0t.parquet#1"),
        sample_key("s", "t.parquet#0"),
    ]


def test_bad_urls_are_refused(folder: Path, store: Store) -> None:
    urls = [
        "https://host.example/a.jpg ",
        f"https://host.example/{'x' * 7900}",
        None,
        "",
        " \t",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://host.example/a.jpg",
        "data:image/png;base64,xxxx",
        "https://",
        "https://host.example/a\x00b.jpg",
        "https://host.example/a\nb.jpg",
        "https://me:secret@host.example/a.jpg",
        "https://host.example/" + "x" * 1_000_000,
        b"\xff\xfe",
    ]
    raw = [url.encode() if isinstance(url, str) else url for url in urls]
    column = pa.Array.from_buffers(pa.utf8(), len(raw), pa.array(raw, pa.binary()).buffers())
    pq.write_table(pa.table({"url": column, "caption": ["x"] * len(raw)}), folder / "t.parquet")
    source = url_list(folder, "t.parquet")
    items = all_items(store, source)
    assert [problem(item) for item in items] == [None, None] + [Cause.BAD_URL] * (len(urls) - 2)
    assert items[0].image == "https://host.example/a.jpg"
    assert items[1].image == items[1].origin == urls[1]
    assert max(len(item.name) + len(item.origin) for item in items) < 17_000
    assert not any("secret" in item.image.detail for item in items if isinstance(item.image, Rejection))
    part = all_ranges(store, source)[0]
    assert list(source.urls(store, part)) == [(item.row, item.image) for item in items]


def test_a_caption_that_is_refused_needs_no_download(folder: Path, store: Store) -> None:
    rows = [{"url": "https://host.example/a.jpg", "caption": said} for said in ("x", None, "bell\x07")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    items = all_items(store, url_list(folder, "t.parquet"))
    assert [problem(item) for item in items] == [None, Cause.NO_CAPTION, Cause.BAD_CAPTION]


def test_selected_rows_keep_their_numbers_and_keys(folder: Path, store: Store) -> None:
    rows = [{"url": f"https://host.example/{n}.jpg", "caption": f"c{n}", "n": n} for n in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    source = url_list(folder, "t.parquet", keep=["n"])
    whole = all_items(store, source)
    again = pa.Table.from_pylist([{**rows[n], ROW: n} for n in (2, 3, 7)])
    pq.write_table(again, folder.parent / "store.parquet")
    store.put("data/retry.parquet", folder.parent / "store.parquet")
    part = Rows("t.parquet", "data/retry.parquet", True, 1, 2)
    assert list(source.items(store, part)) == [whole[3], whole[7]]
    assert list(source.urls(store, part)) == [(3, rows[3]["url"]), (7, rows[7]["url"])]
    assert whole[7].key == sample_key("s", "https://host.example/7.jpg")
    # In the corpus it is a column like any other.
    pq.write_table(again, folder / "own.parquet")
    assert [item.row for item in all_items(store, url_list(folder, "own.parquet"))] == [0, 1, 2]
    with pytest.raises(SettingsError, match="its own column"):
        all_items(store, url_list(folder, "own.parquet", keep=[ROW]))


# Images in tables

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT])
def test_images_in_a_column(folder: Path, store: Store, kind: pa.DataType) -> None:
    images: list[Any] = [b"one", b"", None, b"far too large", b"five"]
    if kind == STRUCT:
        images = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]
        images[4]["path"] = None
    columns = {"image": pa.array(images, kind), "caption": ["a", "b", "c", "d", None], "n": range(5)}
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=2)
    items = all_items(store, parquet_images(folder, "*.parquet", keep=["n"], max_bytes=10), rows=2)
    expected = [None, None, Cause.MISSING, Cause.TOO_MANY_BYTES, Cause.NO_CAPTION]
    assert [problem(item) for item in items] == expected
    assert [item.image for item in items[:2]] == [b"one", b""]
    names = [f"{n}.png" for n in range(4)] if kind == STRUCT else [f"t.parquet#{n}" for n in range(4)]
    assert [item.name for item in items] == [*names, "t.parquet#4"]
    assert [item.kept for item in items] == [{"n": n} for n in range(5)]
    place = [sample_key("s", f"\0t.parquet#{n}") for n in range(5)]
    known = [sample_key("s", hashlib.sha256(data).hexdigest()) for data in (b"one", b"", b"five")]
    assert [item.key for item in items] == [*known[:2], *place[2:4], known[2]]


def test_rows_that_hold_a_path_alone_are_read_from_their_folder(folder: Path, store: Store, tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "deep").mkdir(parents=True)
    (files / "deep" / "1.png").write_bytes(b"one")
    (files / "2.png").write_bytes(b"two, and too large")
    (tmp_path / "secret").write_bytes(b"secret")
    paths = [str(files / "deep" / "1.png"), "deep/1.png", "2.png", "3.png", "../secret", str(tmp_path / "secret"), None]
    images = [{"bytes": None, "path": path} for path in paths] + [{"bytes": b"own", "path": "2.png"}]
    pq.write_table(pa.table({"image": pa.array(images, STRUCT), "caption": ["x"] * 8}), folder / "t.parquet")
    source = parquet_images(folder, "*.parquet", files=str(files), max_bytes=10)
    items = all_items(store, source)
    outside = [Cause.OUTSIDE_FOLDER] * 2
    assert [problem(item) for item in items] == [
        *(None, None, Cause.TOO_MANY_BYTES, Cause.MISSING, *outside, Cause.MISSING, None)
    ]
    assert [items[number].image for number in (0, 1, 7)] == [b"one", b"one", b"own"]
    assert items[0].key == sample_key("s", hashlib.sha256(b"one").hexdigest()), "whatever the picture is called"
    [before] = source.inputs()
    (files / "3.png").write_bytes(b"three")
    [after] = source.inputs()
    assert before.sha256 != after.sha256, "a picture that has come is noticed"
    (files / "4.png").write_bytes(b"nobody names it")
    assert source.inputs() == [after]
    pq.write_table(pa.table({"image": [b"1"], "caption": ["x"]}), folder / "plain.parquet")
    with pytest.raises(SettingsError, match="has no paths: leave `files` out"):
        parquet_images(folder, "plain.parquet", files=str(files)).inputs()


@pytest.mark.parametrize("kind", [pa.null(), pa.struct([("bytes", pa.null()), ("path", pa.string())])])
def test_images_of_which_there_is_none(folder: Path, store: Store, kind: pa.DataType) -> None:
    columns = {"image": pa.nulls(2, kind), "caption": ["a", "b"]}
    pq.write_table(pa.table(columns), folder / "t.parquet")
    pq.write_table(pa.table({"image": pa.nulls(0)}), folder / "u.parquet")
    source = parquet_images(folder, "*.parquet")
    assert [part.input for part in all_ranges(store, source)] == ["t.parquet"]
    assert [problem(item) for item in all_items(store, source)] == [Cause.MISSING] * 2


def test_columns_that_are_no_images(folder: Path, store: Store) -> None:
    pq.write_table(pa.table({"image": ["text"], "caption": ["x"]}), folder / "t.parquet")
    with pytest.raises(SettingsError, match="name a column of bytes"):
        all_items(store, parquet_images(folder, "t.parquet"))
    (folder / "t.jsonl").write_text('{"image": "x", "caption": "x"}')
    with pytest.raises(SettingsError, match=r"no Parquet file"):
        all_items(store, parquet_images(folder, "t.jsonl"))


def test_few_images_are_in_memory_at_once(folder: Path, store: Store) -> None:
    images = [bytes(100_000) for _ in range(400)]
    pq.write_table(
        pa.table({"image": images, "caption": ["x"] * 400}),
        folder / "t.parquet",
        row_group_size=100,
        use_dictionary=False,
    )
    part = all_ranges(store, parquet_images(folder, "t.parquet"), 400)[0]
    before, most = pa.total_allocated_bytes(), 0
    for _ in parquet_images(folder, "t.parquet").items(store, part):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 25 << 20  # of 40 MB, in row groups of 10: two pages of the file, and a batch


@given(groups=st.lists(st.integers(0, 20)), rows=st.integers(1, 8))
def test_cuts_cover_all_rows_in_pieces_of_at_most_so_many(groups: list[int], rows: int) -> None:
    pieces = list(cuts(groups, rows))
    assert [row for first, count in pieces for row in range(first, first + count)] == list(range(sum(groups)))
    assert all(0 < count <= rows for _, count in pieces)


def test_cuts_of_images_lie_between_row_groups(folder: Path, store: Store) -> None:
    pq.write_table(pa.table({"image": [b"x"] * 20, "caption": ["x"] * 20}), folder / "t.parquet", row_group_size=3)
    parts = all_ranges(store, parquet_images(folder, "t.parquet"), 8)
    assert spans(parts) == [(0, 6), (6, 6), (12, 8)]


@quick
@given(cuts=st.lists(st.integers(0, 40)), groups=st.integers(1, 15))
def test_any_range_is_its_rows(tmp_path: Path, cuts: list[int], groups: int) -> None:
    (tmp_path / "any").mkdir(exist_ok=True)
    table = pa.table({"image": [b"%d" % n for n in range(40)], "caption": [f"c{n}" for n in range(40)]})
    pq.write_table(table, tmp_path / "any" / "t.parquet", row_group_size=groups)
    source, store = parquet_images(tmp_path / "any", "t.parquet"), open_store(str(tmp_path))
    edges = sorted({0, 40, *cuts})
    found: list[RawItem] = []
    for a, b in pairwise(edges):
        found += source.items(store, Rows("t.parquet", "t.parquet", False, a, b - a))
    assert [item.image for item in found] == [b"%d" % n for n in range(40)]
    assert [item.row for item in found] == list(range(40))


def test_a_table_that_became_shorter_is_noticed(folder: Path, store: Store) -> None:
    pq.write_table(pa.Table.from_pylist(URLS), folder / "t.parquet")
    source = url_list(folder, "t.parquet", image="link", captions=["short"])
    part = all_ranges(store, source)[0]
    pq.write_table(pa.Table.from_pylist(URLS[:2]), folder / "t.parquet")
    with pytest.raises(DataError, match="has become shorter"):
        list(source.items(store, part))


# Names and patterns


def test_patterns(folder: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "x/c.jsonl", "x/y/d.jsonl", ".hidden.jsonl", "x/.h/e.jsonl", "f[1].jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")

    def names(*tables: str) -> list[str]:
        return [found.name for found in url_list(folder, *tables).inputs()]

    assert names("*.jsonl") == ["a.jsonl", "b.jsonl", "f[1].jsonl"]
    assert names("b.jsonl", "?.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names("x/*.jsonl") == ["x/c.jsonl"]
    assert names("x/**/*.jsonl") == ["x/c.jsonl", "x/y/d.jsonl"]
    assert names("**/[cd].jsonl") == ["x/c.jsonl", "x/y/d.jsonl"]
    assert names("f[[]1].jsonl") == ["f[1].jsonl"]
    with pytest.raises(SettingsError, match=r"no file matches `\*.parquet`.*a.jsonl"):
        names("*.parquet")


def test_patterns_follow_no_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "own.jsonl").write_text("{}")
    (folder / "loop").symlink_to(folder)
    (folder / "alias.jsonl").symlink_to("own.jsonl")
    assert [found.name for found in url_list(folder, "**/*.jsonl").inputs()] == ["alias.jsonl", "own.jsonl"]
    (folder / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(SettingsError, match="leads out of the folder"):
        url_list(folder, "*.jsonl").inputs()
    assert len(url_list(folder, "out.jsonl").inputs()) == 1  # named by the user


# Identity


def test_an_image_that_comes_goes_or_changes_its_size_makes_another_table(folder: Path) -> None:
    for table, names in {"one": "abx", "two": "cd"}.items():
        rows = [{"image": f"./{table}/{name}.jpg", "caption": "x"} for name in names]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{table}.parquet")
        (folder / f"{table}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / table).mkdir()
        for name in names:
            (folder / table / f"{name}.jpg").write_bytes(b"image")

    def identities() -> list[str]:
        source = table_folder(folder, "one.parquet", "one.jsonl", "two.parquet", "two.jsonl")
        return [found.sha256 for found in source.inputs()]

    first = identities()
    assert identities() == first
    (folder / "one" / "unnamed.jpg").write_bytes(b"no table names it")
    assert identities() == first
    for change in (
        lambda path: path.write_bytes(b"larger image"),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
    ):
        change(folder / "one" / "x.jpg")
        now = identities()
        assert now[0] != first[0] and now[1] != first[1] and now[2:] == first[2:]
    (folder / "one" / "x.jpg").write_bytes(b"image")
    assert identities() == first
    (folder / "two.jsonl").write_text((folder / "two.jsonl").read_text() + "\n")
    assert identities()[:3] == first[:3] and identities()[3] != first[3]


def test_a_folder_without_images_has_an_identity(folder: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["x"]}), folder / "t.parquet")
    (folder.parent / "bare").mkdir()
    (folder / "t.parquet").rename(folder.parent / "t.parquet")
    source = table_folder(folder, str(folder.parent / "t.parquet"))
    assert len(source.inputs()) == 1

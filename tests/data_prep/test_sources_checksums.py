"""A picture that is replaced by one of its size is another input; a touch or a copy of the whole corpus is none."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import Input, Range, RawItem, Source, checksums, listed
from data_prep.sources.folders import LocalFolder, StoreFolder
from infra.store import Store, open_store
from tests.data_prep.corpora import HUGGING_FACE_IMAGE, prepare_here, settings_for, write_corpus
from tests.data_prep.test_sources import table_folder, text_folder
from tests.data_prep.test_sources_listings import image_net
from tests.data_prep.test_sources_stores import bucket
from tests.data_prep.test_sources_tables import parquet_images

__all__ = ["bucket"]  # a fixture

COUNT = 6


def write(folder: Path) -> None:
    """Pictures of one size, each with words beside it, and tables that name them all."""
    (folder / "cat").mkdir()
    names = [f"cat/{number}.jpg" for number in range(COUNT)]
    for number, name in enumerate(names):
        put(folder / name, b"picture %d" % number, 1000 + number)
        (folder / name).with_suffix(".txt").write_text("a cat")
    rows = [{"image": name, "caption": "x"} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", row_group_size=4)
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = pa.array([{"bytes": None, "path": name} for name in names], HUGGING_FACE_IMAGE)
    pq.write_table(pa.table({"image": paths, "caption": ["x"] * COUNT}), folder / "paths.parquet")


def put(path: Path, data: bytes, time: float) -> None:
    path.write_bytes(data)
    os.utime(path, (time, time))


KINDS: dict[str, Callable[[Path], Source]] = {
    "text_folder": text_folder,
    "imagenet": image_net,
    "table": lambda folder: table_folder(folder, "t.parquet"),
    "lines": lambda folder: table_folder(folder, "t.jsonl"),
    "paths": lambda folder: parquet_images(folder, "paths.parquet", files=str(folder)),
}


class Corpus:
    """A source that is planned and read as `prepare` does it, again and again."""

    def __init__(self, store: Store, source: Source, rows: int = 2) -> None:
        self.store, self.source, self._rows = store, source, rows
        self.planned: list[Range] = []
        self._known: list[Input] = []

    def inputs(self) -> list[str]:
        """What is there now, planned as far as it was not."""
        found = self.source.inputs(self.store, self.planned)
        for new in found:
            if new not in self._known:
                self._known.append(new)
                self.planned += self.source.ranges(self.store, new, self._rows)
        return [new.sha256 for new in found]

    def read(self) -> list[RawItem]:
        return [item for part in self.planned for item in self.source.items(self.store, part)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_picture_is_noticed_and_a_touched_one_is_not(folder: Path, store: Store, kind: str) -> None:
    write(folder)
    corpus, path = Corpus(store, KINDS[kind](folder)), folder / "cat" / "3.jpg"
    first = corpus.inputs()
    put(path, b"PICTURE 3", 5000)
    assert corpus.inputs() == first, "nothing was made of the old one"
    put(path, b"picture 3", 1003)
    corpus.read()
    put(path, b"picture 3", 6000)
    assert corpus.inputs() == first, "a time alone says nothing"
    put(path, b"PICTURE 3", 6000)
    second = corpus.inputs()
    assert second != first and corpus.inputs() == second
    corpus.read()
    assert corpus.inputs() == second, "whoever has read the new one"
    put(path, b"picture3!", 7000)
    third = corpus.inputs()
    assert third not in (first, second)
    corpus.read()
    put(path, b"picture 3", 1003)
    assert corpus.inputs() == first, "it is back"


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_has_kept_its_time_is_taken_for_what_it_was(folder: Path, store: Store, kind: str) -> None:
    write(folder)
    corpus = Corpus(store, KINDS[kind](folder))
    first = corpus.inputs()
    corpus.read()
    put(folder / "cat" / "3.jpg", b"PICTURE 3", 1003)
    assert corpus.inputs() == first


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from now on."""
    seen: list[str] = []
    read = LocalFolder.read_stamped

    def noted(self: LocalFolder, name: str, limit: int) -> Any:
        seen.append(name)
        return read(self, name, limit)

    monkeypatch.setattr(LocalFolder, "read_stamped", noted)
    return seen


@pytest.mark.parametrize("kind", ["text_folder", "table"])
def test_of_a_copied_corpus_some_files_are_looked_at(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write(folder)
    corpus = Corpus(store, KINDS[kind](folder))
    first = corpus.inputs()
    corpus.read()
    for number in range(COUNT):
        put(folder / "cat" / f"{number}.jpg", b"picture %d" % number, 9000)
    monkeypatch.setattr(checksums, "MOST", 2)
    seen = read_files(monkeypatch)
    assert corpus.inputs() == first
    assert [name for name in seen if name.endswith(".jpg")] == ["cat/0.jpg", "cat/3.jpg"]
    put(folder / "cat" / "3.jpg", b"PICTURE 3", 9000)
    seen.clear()
    second = corpus.inputs()
    assert second != first
    assert {f"cat/{number}.jpg" for number in range(COUNT)} <= set(seen), "where one has changed, all are looked at"
    corpus.read()
    put(folder / "cat" / "4.jpg", b"PICTURE 4", 9500)
    assert corpus.inputs() != second


def test_plans_that_cut_a_table_otherwise_know_of_each_other(folder: Path, store: Store) -> None:
    write(folder)
    source = KINDS["table"](folder)
    one, other = Corpus(store, source, 2), Corpus(store, source, 4)
    first = one.inputs()
    one.read()
    put(folder / "cat" / "3.jpg", b"PICTURE 3", 6000)
    second = other.inputs()
    other.read()
    assert one.inputs() == other.inputs() == second != first
    put(folder / "cat" / "5.jpg", b"PICTURE 5", 6000)
    assert one.inputs() == other.inputs() not in (first, second)


def test_how_many_were_replaced_is_told(folder: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    write(folder)
    for kind in ("text_folder", "table"):
        corpus = Corpus(store, KINDS[kind](folder))
        corpus.inputs()
        corpus.read()
        for number in (1, 4):
            put(folder / "cat" / f"{number}.jpg", f"{kind:.8}{number}".encode().ljust(9), 6000 + len(kind))
        with caplog.at_level(logging.WARNING):
            corpus.inputs()
    said = [record.getMessage() for record in caplog.records]
    assert any("2 images of the source `s` were replaced" in text for text in said)
    assert any("2 images that t.parquet names were replaced" in text for text in said)


@pytest.mark.parametrize("kind", ["imagenet", "table"])
def test_in_a_bucket_its_tag_tells(folder: Path, store: Store, bucket: Store, kind: str) -> None:
    write(folder)
    apart = open_store(f"s3://corpora/looked-{kind}")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            apart.put(str(path.relative_to(folder)), path)
    corpus = Corpus(store, KINDS[kind](folder).model_copy(update={"url": apart.url}))
    first = corpus.inputs()
    corpus.read()
    assert all(file.stamp for file in StoreFolder(apart).names())
    apart.put("cat/3.jpg", b"picture 3")
    assert corpus.inputs() == first
    apart.put("cat/3.jpg", b"PICTURE 3")
    assert corpus.inputs() != first
    corpus.read()
    apart.put("cat/3.jpg", b"picture 3")
    # What moves from a bucket to a disk has other stamps, and is what it was.
    corpus.source = KINDS[kind](folder)
    assert corpus.inputs() == first


def test_what_was_seen_and_is_damaged_is_of_no_use_and_no_harm(folder: Path, store: Store) -> None:
    write(folder)
    corpus = Corpus(store, KINDS["table"](folder))
    first = corpus.inputs()
    corpus.read()
    for entry in list(store.list("looked/")):
        store.put(entry.key, b"PAR1")
    put(folder / "cat" / "3.jpg", b"PICTURE 3", 6000)
    assert corpus.inputs() == first


def test_a_prepared_corpus_is_prepared_anew_where_a_picture_was_replaced(folder: Path, store: Store) -> None:
    write_corpus(folder, 20)
    first = prepare_here(store, settings_for(folder))
    assert prepare_here(store, settings_for(folder)) == first
    (folder / "images" / "00000.jpeg").touch()
    assert prepare_here(store, settings_for(folder)) == first
    path = folder / "images" / "00001.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    put(path, bytes(data), 2_000_000_000)
    second = prepare_here(store, settings_for(folder))
    assert (second.digest, len(second.shards), second.planned) == (first.digest, len(first.shards), 2 * first.planned)
    assert prepare_here(store, settings_for(folder)) == second


# Listings in parts


def test_what_changes_in_a_folder_costs_the_part_that_it_is_in(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed, "LISTED", 2)
    write(folder)
    corpus = Corpus(store, text_folder(folder))
    first = corpus.inputs()
    assert len(first) == 3
    corpus.read()
    put(folder / "cat" / "3.jpg", b"PICTURE 3", 6000)
    second = corpus.inputs()
    assert set(second) - set(first) == {second[-1]} and set(first) - set(second) == {first[1]}
    (folder / "cat" / "4.jpg").unlink()
    third = corpus.inputs()
    assert {first[0], second[-1]} < set(third) and len(third) == 3
    put(folder / "cat" / "9.jpg", b"picture 9", 1)
    (folder / "cat" / "9.txt").write_text("a cat")
    assert corpus.inputs()[:3] == third and len(corpus.inputs()) == 4


def test_a_listing_of_an_earlier_version_is_read(folder: Path, store: Store) -> None:
    """It has no column of what replaced pictures, and its identity is told without one."""
    write(folder)
    corpus = Corpus(store, text_folder(folder))
    first = corpus.inputs()
    key = corpus.planned[0].table
    table = pq.read_table(pa.BufferReader(store.get(key))).drop_columns(["others"])
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    store.put("data/tables/old.parquet", out.getvalue().to_pybytes())
    corpus.planned = [part._replace(table="data/tables/old.parquet") for part in corpus.planned]
    [found] = corpus.source.inputs(store, corpus.planned)
    assert ([found.sha256], found.table) == (first, "data/tables/old.parquet")
    assert [item.image for item in corpus.read()] == [b"picture %d" % number for number in range(COUNT)]


def test_many_listings_are_opened_few_at_a_time(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "LISTED", 2)
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(b"x")
    source = text_folder(folder, caption_suffix="")
    keys = [found.table for found in source.inputs(store)]
    stored = [listed.Stored(store, key) for key in keys]
    for one in stored:
        list(one)
    opened: list[int] = []

    def counted(self: listed.Stored) -> Iterator[listed.Listed]:
        opened.append(1)
        yield from _rows_of(self)
        opened.pop()

    _rows_of = listed.Stored.__iter__
    monkeypatch.setattr(listed.Stored, "__iter__", counted)
    most = 0
    names = []
    for row in listed.merged(stored):
        most = max(most, len(opened))
        names.append(row.name)
    assert names == sorted(names) and len(names) == 40 and most <= 2

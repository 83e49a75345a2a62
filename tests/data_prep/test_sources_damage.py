"""Damage in a Parquet costs the rows that are lost, each a rejection; a list of URLs is prepared all the same."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rejections import Cause, Rejection
from data_prep.sources import parquet
from infra.errors import DataError
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store
from tests.data_prep import zoo
from tests.data_prep.corpora import prepare_here, retry_failed, shaded
from tests.data_prep.test_linking import settings_for
from tests.data_prep.test_sources import all_items, all_ranges, problem, table_folder
from tests.data_prep.test_sources_tables import parquet_images, url_list
from tests.data_prep.web import Stream, Web


def zeroed(path: Path, group: int, column: int, share: float = 0.5) -> None:
    """A Parquet of which a page is zeros, this far into the column's part of a row group."""
    there = pq.read_metadata(path).row_group(group).column(column)
    first = there.dictionary_page_offset or there.data_page_offset
    data = bytearray(path.read_bytes())
    at = first + int(share * there.total_compressed_size)
    end = first + there.total_compressed_size
    data[at : min(end, at + 6000)] = bytes(min(end, at + 6000) - at)
    path.write_bytes(data)


def write_pages(path: Path, table: pa.Table, **options: Any) -> None:
    """In row groups of 100 rows, and those in pages of some rows."""
    plain = {"row_group_size": 100, "data_page_size": 2000, "write_batch_size": 8, "use_dictionary": False}
    pq.write_table(table, path, **plain | options)


def of_urls(rows: int) -> pa.Table:
    urls = [f"https://host.example/{hashlib.sha256(b'%d' % n).hexdigest() * 3}.jpg" for n in range(rows)]
    return pa.table({"url": urls, "caption": [f"c{n}" for n in range(rows)], "n": range(rows)})


DAMAGED = {"images": 0, "captions": 1, "kept": 2}


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("column", DAMAGED)
def test_a_zeroed_page_costs_the_rows_that_are_lost(folder: Path, store: Store, column: str, compression: str) -> None:
    images = [hashlib.sha512(b"%d" % n).digest() * 8 for n in range(400)]
    said = [hashlib.sha256(b"c%d" % n).hexdigest() for n in range(400)]
    numbers = pa.array([hashlib.sha256(b"n%d" % n).hexdigest() * 2 for n in range(400)])
    table = pa.table({"image": images, "caption": said, "n": numbers})
    write_pages(folder / "t.parquet", table, compression=compression)
    source = parquet_images(folder, "t.parquet", keep=["n"])
    whole = all_items(store, source, 30)
    zeroed(folder / "t.parquet", 1, DAMAGED[column])
    items = all_items(store, source, 30)
    lost = [item.row for item in items if problem(item)]
    assert [item.row for item in items] == list(range(400))
    assert lost == list(range(lost[0], 200)) and 100 < lost[0] < 190, "from the page on to the end of its row group"
    assert {item.image for item in items if problem(item)} == {
        Rejection(Cause.BAD_ROW, "a damaged page in row group 1")
    }
    assert [item for item in items if not problem(item)] == [item for item in whole if item.row not in lost]
    assert len({item.key for item in items}) == 400
    assert {item.name for item in items if problem(item)} == {f"t.parquet#{row}" for row in lost}
    assert all(item.kept == {"n": None} and not item.captions for item in items if problem(item))


@pytest.mark.parametrize("rows", [7, 30, 64, 130, 400])
def test_the_same_rows_are_lost_however_they_are_cut(folder: Path, store: Store, rows: int) -> None:
    write_pages(folder / "t.parquet", of_urls(400))
    zeroed(folder / "t.parquet", 2, 0)
    source = url_list(folder, "t.parquet", keep=["n"])
    reference = [problem(item) for item in all_items(store, source, 25)]
    assert reference.count(Cause.BAD_ROW) in range(10, 90) and reference.count(None) == 400 - reference.count(
        Cause.BAD_ROW
    )
    assert [problem(item) for item in all_items(store, source, rows)] == reference
    # Of a list of URLs their column alone is read, many rows at a time, by whoever downloads.
    asked = [url for part in all_ranges(store, source, rows) for url in source.urls(store, part)]
    assert [row for row, _ in asked] == list(range(400))
    assert [isinstance(url, Rejection) for _, url in asked] == [cause is not None for cause in reference]


def test_damage_in_a_page_of_captions_costs_no_download(folder: Path, store: Store) -> None:
    said = [hashlib.sha256(b"c%d" % n).hexdigest() * 2 for n in range(200)]
    table = of_urls(200).set_column(1, "caption", pa.array(said))
    write_pages(folder / "t.parquet", table)
    zeroed(folder / "t.parquet", 0, 1)
    source = url_list(folder, "t.parquet")
    items = all_items(store, source)
    asked = [url for part in all_ranges(store, source) for _, url in source.urls(store, part)]
    assert Cause.BAD_ROW in map(problem, items) and not any(isinstance(url, Rejection) for url in asked)


def test_a_table_whose_names_are_damaged_is_planned(folder: Path, store: Store) -> None:
    names = [f"{hashlib.sha256(b'%d' % n).hexdigest()}.jpg" for n in range(200)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    write_pages(folder / "t.parquet", pa.table({"image": names, "caption": names}))
    zeroed(folder / "t.parquet", 1, 0)
    items = all_items(store, table_folder(folder, "t.parquet"))
    good = [item for item in items if not problem(item)]
    assert 100 < len(good) < 200 and [item.name for item in good] == names[: len(good)]
    assert {problem(item) for item in items[len(good) :]} == {Cause.BAD_ROW} and len(items) == 200


def test_a_table_of_our_own_that_is_damaged_is_an_error_and_no_rejection(folder: Path, store: Store) -> None:
    rows = of_urls(2000).to_pylist()
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = url_list(folder, "t.jsonl")
    [part] = all_ranges(store, source, 5000)
    path = folder.parent / "store" / part.table
    zeroed(path, 0, 0)
    with pytest.raises(DataError, match="not a readable Parquet"):
        list(source.items(store, part))


class Failing(io.RawIOBase):
    """A file on a disk that fails from some byte on."""

    def __init__(self, data: bytes, first: int, last: int) -> None:
        self._file, self._bad = io.BytesIO(data), range(first, last)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        if self.tell() < self._bad.stop and self.tell() + len(buffer) > self._bad.start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._file.readinto(buffer)


def test_a_disk_that_fails_is_no_fault_of_a_row(folder: Path) -> None:
    write_pages(folder / "t.parquet", of_urls(4000))  # so many that the footer is read without them
    data = (folder / "t.parquet").read_bytes()
    there = pq.read_metadata(folder / "t.parquet").row_group(2).column(0)
    file = Failing(data, there.data_page_offset, there.data_page_offset + 100)
    with (
        pytest.raises(DataError, match=r"t.parquet cannot be read \(Input/output error\): check the disk"),
        parquet.opened(cast(BinaryIO, file), "t.parquet") as table,
    ):
        list(parquet.batches(table, "t.parquet", ["url"], 64))


def test_a_damaged_list_of_urls_is_prepared_and_tried_again(folder: Path, store: Store) -> None:
    """The rows that are lost are counted in every run, and the others are downloaded, tried again and accepted."""
    picture = zoo.saved(shaded(1, 20), "PNG")

    async def down(_: Any, stream: Stream) -> None:
        await stream.answer(b"", 503)

    with Web({f"/{'x' * 300}{number}": picture for number in range(120)}) as web:
        web.pages[f"/{'x' * 300}0"] = down
        noise = [hashlib.sha256(b"%d" % number).hexdigest() * 3 for number in range(120)]
        urls = [web.url(f"/{'x' * 300}{number}") + f"#{noise[number]}" for number in range(120)]
        write_pages(folder / "t.parquet", pa.table({"url": urls, "caption": ["said"] * 120}), row_group_size=40)
        zeroed(folder / "t.parquet", 1, 0)
        settings = settings_for(folder, rows_per_shard=30)

        def causes() -> list[str | None]:
            plan = prepare_here(store, settings)
            shards = list_shards(store, shard_prefix(plan.digest, "16"), plan.all_numbers("16"))
            rows = [row for shard in shards for row in read_index(store, shard).to_pylist()]
            again = {row["row"]: row["cause"] for row in rows}
            assert sorted(again) == list(range(120))
            return [again[row] for row in range(120)]

        first = causes()
        lost = [row for row, cause in enumerate(first) if cause == "bad_row"]
        assert lost == list(range(lost[0], 80)) and lost[0] > 40
        assert {cause for row, cause in enumerate(first) if row not in lost} == {None, "server_error"}
        assert len(web.requests) == 120 - len(lost)
        web.pages[f"/{'x' * 300}0"] = picture
        assert retry_failed(store, settings) == 1
        assert causes() == [None, *first[1:]]
        assert len(web.requests) == 121 - len(lost)

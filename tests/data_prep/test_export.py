from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.export import Exported, export, layouts, listing
from data_prep.export.listing import drawn
from data_prep.prepare.plan import Plan
from data_prep.snapshots.build import snapshot, snapshot_key
from data_prep.snapshots.forget import AffectedExport, forget
from data_prep.snapshots.settings import SnapshotSettings
from data_prep.upkeep.gc import collect
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.records import ExportRecord, SnapshotRecord, read_record
from infra.shards import list_shards, read_index, read_selection, shard_prefix
from infra.store import FileStore, Store, open_store
from tests.data_prep.corpora import contents, prepare_here, settings_for, write_corpus
from tests.infra.test_store import s3, s3_store

__all__ = ["s3"]  # a fixture

SETTINGS = {"size": 32, "held_out": 0.3, "captions": {"short": 3, "long": 1}, "weights": {"small": 2.5}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    folder = tmp_path_factory.mktemp("export")
    write_corpus(folder / "corpus", 60)
    store = open_store(str(folder / "store"))
    return store, prepare_here(store, settings_for(folder / "corpus", sizes=[32]))


def made(prepared: tuple[Store, Plan], **changed: Any) -> tuple[str, SnapshotRecord]:
    store, plan = prepared
    wanted = parse(SnapshotSettings, SETTINGS | changed)
    record = snapshot(store, plan.digest, plan.edition, wanted)
    return snapshot_key(plan.digest, plan.edition, wanted, record.forgotten), record


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of few samples."""
    monkeypatch.setattr(layouts, "MIB", 25_000)
    monkeypatch.setattr(layouts.HuggingFace, "limit", 10)


def listed(store: Store, record: SnapshotRecord, *, held_out: bool) -> list[dict[str, Any]]:
    """The selection's rows, with the names that an export gives them."""
    rows = read_selection(store, record, held_out=held_out).to_pylist()
    seen: Counter[str] = Counter()
    for row in rows:
        row["name"] = f"{row['key']}-{seen[row['key']]}" if seen[row["key"]] else row["key"]
        seen[row["key"]] += 1
        row["image"] = store.get(row["tar"], row["offset"], row["offset"] + row["length"])
    return rows


def check(sample: dict[str, Any], row: dict[str, Any], index: dict[str, dict[str, Any]]) -> None:
    weights = {text: round(weight, 6) for text, weight in zip(row["captions"], row["caption_weights"], strict=True)}
    assert dict(zip(sample["captions"], sample["caption_weights"], strict=True)) == weights
    assert sample["text"] in row["captions"]
    for name in ("key", "source", "licence", "origin", "name", "width", "height", "objects", "score", "format"):
        assert sample[name] == index[row["key"]][name]
    assert not {"offset", "phash", "accepted", "cause"} & sample.keys()


def index_of(store: Store, plan: Plan) -> dict[str, dict[str, Any]]:
    shards = list_shards(store, shard_prefix(plan.digest, "32"))
    return {row["key"]: row for shard in shards for row in read_index(store, shard).to_pylist()}


@pytest.mark.usefixtures("small")
def test_webdataset_is_read_by_webdataset(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = prepared
    key, record = made(prepared)
    done = export(store, key, open_store(str(tmp_path / "out")), "webdataset", 1)
    index = index_of(store, plan)
    for split, rows in (("train", record.rows), ("validation", record.held_out_rows)):
        folder = tmp_path / "out" / split
        tars = sorted(folder.iterdir())
        assert len(tars) == done.splits[split].parts > 1 and done.splits[split].rows == rows
        assert [tar.name for tar in tars] == [f"{number:05d}.tar" for number in range(len(tars))]
        found = []
        for tar in tars:
            found += list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
        expected = listed(store, record, held_out=split == "validation")
        assert len(found) == len(expected) == rows
        for sample, row in zip(found, expected, strict=True):
            assert sample["__key__"] == row["name"] and sample["txt"] == sample["json"]["text"]
            check(sample["json"], row, index)
        raw = [one["jpg"] for tar in tars for one in webdataset.WebDataset(str(tar), shardshuffle=False)]
        assert raw == [row["image"] for row in expected]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "train", "validation"]


@pytest.mark.usefixtures("small")
def test_hugging_face_finds_a_line_for_every_picture(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = prepared
    key, record = made(prepared)
    done = export(store, key, open_store(str(tmp_path / "out")), "huggingface")
    index = index_of(store, plan)
    for split in ("train", "validation"):
        folder = tmp_path / "out" / split
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        expected = listed(store, record, held_out=split == "validation")
        assert len(lines) == len(expected) == done.splits[split].rows
        assert {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")} == {one["file_name"] for one in lines}
        for line, row in zip(lines, expected, strict=True):
            assert line["file_name"].rpartition("/")[2] == f"{row['name']}.jpg"
            assert (folder / line["file_name"]).read_bytes() == row["image"]
            check(line, row, index)
            assert Image.open(folder / line["file_name"]).size == (32, 32)
        assert max(Counter(one["file_name"].partition("/")[0] for one in lines).values()) <= 10


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 10**6))
@settings(max_examples=20)
def test_captions_are_drawn_as_they_weigh(weights: list[int], seed: int) -> None:
    texts = [str(number) for number in range(len(weights))]
    counts = Counter(drawn(f"{seed}-{number}", texts, weights) for number in range(2000))
    for text, weight in zip(texts, weights, strict=True):
        share = weight / sum(weights)
        assert abs(counts[text] / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5 + 1e-9


def test_a_caption_without_weight_is_never_drawn() -> None:
    assert {drawn(str(number), ["a", "b", "c"], [0.0, 1.0, 0.0]) for number in range(100)} == {"b"}


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), limit=st.integers(1, 60), rows=st.integers(1, 9))
@settings(max_examples=60)
def test_parts_are_as_large_as_they_may_be(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, rows: int
) -> None:
    import numpy as np
    import pyarrow as pa

    path = tmp_path_factory.mktemp("parts") / "selection.parquet"
    keys = [str(number // 2) for number in range(len(lengths))]
    pq.write_table(pa.table({"key": keys, "length": lengths}), path, row_group_size=rows)
    parts = list(
        listing.Listing(FileStore(path.parent), "p", "s", path).parts(limit, lambda rows: np.array(rows["length"]))
    )
    assert [length for part in parts for length in part["length"].to_pylist()] == lengths
    names = [name for part in parts for name in part["name"].to_pylist()]
    assert names == [f"{key}-1" if number % 2 else key for number, key in enumerate(keys)]
    sums = [sum(part["length"].to_pylist()) for part in parts]
    assert all(total <= limit or part.num_rows == 1 for total, part in zip(sums, parts, strict=True))
    assert all(total + part["length"][0].as_py() > limit for total, part in zip(sums, parts[1:], strict=False))


class Stopped(Exception):
    pass


class Stopping(FileStore):
    """Lets so many objects be written."""

    left = 0

    def put(self, key: str, data: bytes | Path) -> None:
        if not self.left:
            raise Stopped
        self.left -= 1
        super().put(key, data)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("layout", "left"), [("webdataset", 3), ("huggingface", 25)])
def test_one_that_was_stopped_goes_on(prepared: tuple[Store, Plan], tmp_path: Path, layout: Any, left: int) -> None:
    store, _ = prepared
    key, _ = made(prepared)
    whole = open_store(str(tmp_path / "whole"))
    done = export(store, key, whole, layout, 1)
    expected = contents(whole)
    to, stops, written = Stopping(tmp_path / "out"), 0, 0
    while True:
        to.left = left
        try:
            assert export(store, key, to, layout, 1) == done
            break
        except Stopped:
            stops += 1
            assert not to.exists("export.json")
            assert len(contents(to)) > written, "it begins anew"
            written = len(contents(to))
    assert stops > 1 and contents(to) == expected
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    to.left = 0
    assert export(store, key, to, layout, 1) == done, "one that is there is left alone"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_place_holds_one_export_and_nothing_else(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store, _ = prepared
    key, _ = made(prepared)
    other, _ = made(prepared, held_out=0.0)
    out = open_store(str(tmp_path / "out"))
    export(store, key, out, "webdataset")
    before = contents(out)
    refused: list[Callable[[], Exported]] = [
        lambda: export(store, other, out, "webdataset"),
        lambda: export(store, key, out, "huggingface"),
        lambda: export(store, key, out, "webdataset", 7),
    ]
    for again in refused:
        with pytest.raises(SettingsError, match="holds another export"):
            again()
    assert contents(out) == before
    begun = Stopping(tmp_path / "begun")
    with pytest.raises(Stopped):
        export(store, key, begun, "webdataset")
    with pytest.raises(SettingsError, match="the beginning of another export"):
        export(store, other, begun, "webdataset")
    mine = open_store(str(tmp_path / "mine"))
    mine.put("notes.txt", b"somebody's")
    with pytest.raises(SettingsError, match="is not empty"):
        export(store, key, mine, "webdataset")
    for inside in (store.url, f"{store.url}/out", str(Path(store.url.removeprefix("file://")).parent)):
        with pytest.raises(SettingsError, match="in one another"):
            export(store, key, open_store(inside), "webdataset")


def test_another_store_holds_the_same(prepared: tuple[Store, Plan], s3: str, tmp_path: Path) -> None:
    store, _ = prepared
    key, _ = made(prepared, filter="row < 12")
    folder, bucket = open_store(str(tmp_path / "out")), s3_store(f"http://{s3}")
    for layout in ("webdataset", "huggingface"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for entry in list(bucket.list()):
            bucket.delete(entry.key)
        assert export(store, key, bucket, layout) == export(store, key, folder, layout)
        assert contents(bucket) == contents(folder)
        assert bucket.url in {read_record(store, entry.key, ExportRecord).to for entry in store.list("exports/")}


def test_what_was_forgotten_since_is_not_given_out(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    prepared = store, prepare_here(store, settings_for(tmp_path / "corpus", sizes=[32]))
    key, record = made(prepared)
    out = open_store(str(tmp_path / "out"))
    export(store, key, out, "webdataset")
    rows = [row for row in index_of(*prepared).values() if row["accepted"]]
    pixels = Counter(row["pixels_sha256"] for row in rows)
    twins = [row for row in rows if row["pixels_sha256"] == next(one for one, count in pixels.items() if count > 1)]
    rejected = next(row for row in index_of(*prepared).values() if not row["accepted"])
    forget(store, [rejected["key"]], "asked")
    assert export(store, key, out, "webdataset"), "the snapshot has none of them"
    found = forget(store, [twins[0]["name"]], "asked")
    assert found.exports == [AffectedExport(out.url, "webdataset", key)]
    new, _ = made(prepared)
    for to in (out, open_store(str(tmp_path / "more"))):
        with pytest.raises(DataError, match="2 samples of this snapshot have been forgotten"):
            export(store, key, to, "webdataset")
    assert not (tmp_path / "more").exists()
    done = export(store, new, open_store(str(tmp_path / "new")), "huggingface")
    given_out = "".join(map(str, (tmp_path / "new").rglob("*")))
    assert not any(row["key"] in given_out for row in twins)
    assert sum(split.rows for split in done.splits.values()) < record.rows + record.held_out_rows
    assert forget(store, [twins[0]["name"]], "asked again", dry_run=True).exports == found.exports
    assert collect(store, 0.0).orphans == {}


def test_damage_is_not_given_out(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    prepared = store, prepare_here(store, settings_for(tmp_path / "corpus", sizes=[32]))
    key, record = made(prepared)
    row = read_selection(store, record).to_pylist()[0]
    tar = store.get(row["tar"])
    spoilt = bytearray(tar)
    spoilt[row["offset"] + row["length"] // 2] ^= 1
    for data in (bytes(spoilt), tar[: row["offset"] + 5]):
        store.put(row["tar"], data)
        with pytest.raises(DataError, match=f"damaged: the image of {row['key']} .* data verify --drop-damaged"):
            export(store, key, open_store(str(tmp_path / "out")), "webdataset")
        assert not (tmp_path / "out" / "export.json").exists()
    store.put(row["tar"], tar)
    assert export(store, key, open_store(str(tmp_path / "out")), "webdataset").splits["train"].rows == record.rows


def test_other_formats_keep_their_suffix(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 10)
    store = open_store(str(tmp_path / "store"))
    prepared = store, prepare_here(store, settings_for(tmp_path / "corpus", sizes=[32], format="webp"))
    key, record = made(prepared, held_out=0.0)
    done = export(store, key, open_store(str(tmp_path / "out")), "huggingface")
    pictures = sorted((tmp_path / "out").rglob("*.webp"))
    assert done.splits.keys() == {"train"} and len(pictures) == record.rows
    assert Image.open(io.BytesIO(pictures[0].read_bytes())).format == "WEBP"

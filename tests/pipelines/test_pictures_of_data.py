from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.prepare.plan import Plan
from data_prep.upkeep import statistics
from data_prep.upkeep.statistics import summarise
from infra.errors import DataError, SettingsError
from infra.records import ShardRecord, put_data
from infra.shards import CAPTIONS, list_shards, parquet_bytes, read_index, shard_key, shard_prefix
from infra.store import Store, open_store
from pipelines.pictures import samples, sheet
from pipelines.pictures.samples import contact_sheet
from pipelines.pictures.statistics import draw
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus
from tests.data_prep.test_snapshot import scored

HOSTILE = [
    "$\\nonsense{ ^_$",
    "一只猫坐在垫子上" * 40,
    "🦊👩‍👩‍👧 e\u0301\u0301\u0301\u202egnirts\u202c\u2028\x00\x1b[31m\x7f\ttab\nline",
    "w" * 5000,
    "{not} %s <b>bold</b> \\alpha \\",
    "",
    " \n ",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    folder = tmp_path_factory.mktemp("look")
    sources = []
    for name in ("one", "other"):
        write_corpus(folder / name, 30 if name == "one" else 20)
        sources.append(settings_for(folder / name).sources[0].model_dump() | {"name": name, "url": str(folder / name)})
    store = open_store(str(folder / "store"))
    return store, prepare_here(store, settings_for(folder / "one", sources=sources))


def rows_of(store: Store, plan: Plan) -> list[dict[str, Any]]:
    shards = list_shards(store, shard_prefix(plan.digest, "16"))
    return [row for shard in shards for row in read_index(store, shard).to_pylist()]


def test_a_summary_counts_every_row(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    rows = rows_of(store, plan)
    accepted = [row for row in rows if row["accepted"]]
    found = summarise(store, plan.digest, plan.edition, "16", columns=["score"], readers=3)
    assert (found.inputs, found.accepted) == (len(rows), len(accepted))
    assert found.rejected == Counter(row["cause"] for row in rows if row["cause"])
    assert list(found.sources) == ["one", "other"], "the larger one first"
    for name, source in found.sources.items():
        here = [row for row in rows if row["source"] == name]
        assert source.accepted == sum(row["accepted"] for row in here)
        assert source.rejected == Counter(row["cause"] for row in here if row["cause"])
        assert source.bytes == sum(row["length"] or 0 for row in here)
    assert found.formats == Counter(row["format"] for row in accepted)
    assert found.licences == {"CC0-1.0": len(accepted)}
    assert found.buckets == {"16x16": len(accepted)}
    assert found.captions == {"long": len(accepted), "short": len(accepted)}
    words = [len(c["text"].split()) for row in accepted for c in row["captions"] if c["kind"] == "long"]
    assert found.words["long"].mean == pytest.approx(np.mean(words))
    assert found.words["long"].counts == np.histogram(words, statistics.WORDS)[0].tolist()
    assert found.shorter_side.least == found.shorter_side.most == 40
    assert found.aspect.mean == pytest.approx(45 / 40)
    assert sum(found.values["score"].counts) == len(accepted)
    assert found.values["score"].most == pytest.approx(max(row["score"] for row in accepted))
    assert json.loads(found.model_dump_json())["accepted"] == len(accepted)
    assert summarise(store, plan.digest, plan.edition, "16", columns=["score"], readers=1) == found


def test_what_is_not_there_is_said(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    with pytest.raises(DataError, match="no shards of size 99"):
        summarise(store, plan.digest, plan.edition, "99")
    with pytest.raises(SettingsError, match="no shard has a column `nothing`"):
        summarise(store, plan.digest, plan.edition, "16", columns=["nothing"])
    with pytest.raises(SettingsError, match="`name` is no column of numbers"):
        summarise(store, plan.digest, plan.edition, "16", columns=["name"])
    with pytest.raises(DataError, match="no scores called `none`"):
        summarise(store, plan.digest, plan.edition, "16", scores=["none"])


def test_scores_are_counted_beside_the_rest(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = prepared
    causes = {"0": "unreadable_image", "1": "no_caption"}  # of the keys that begin so

    def value(keys: list[str]) -> pa.Array:
        return pa.array([None if key[0] in causes else int(key[:4], 16) / 16**4 for key in keys], pa.float32())

    def failure(keys: list[str]) -> pa.Array:
        return pa.array([causes.get(key[0]) for key in keys], pa.string())

    def written(keys: list[str]) -> pa.Array:
        return pa.array([[{"kind": "vlm", "text": "two words"}] if key[0] < "8" else None for key in keys], CAPTIONS)

    scored(prepared, "one", clip_score=value, clip_failure=failure)
    scored(prepared, "other", clip_score=lambda keys: pa.array(np.ones(len(keys))), clip_failure=failure)
    scored(prepared, "writer", captions=written, captioner_failure=lambda keys: pa.nulls(len(keys), pa.string()))
    accepted = [row for row in rows_of(store, plan) if row["accepted"]]
    counted = {cause: sum(row["key"][0] == first for row in accepted) for first, cause in causes.items()}
    assert all(counted.values())

    def summed(*scores: str, columns: tuple[str, ...] = ()) -> statistics.Summary:
        return summarise(store, plan.digest, plan.edition, "16", scores=scores, columns=columns)

    found = summed("one", "writer", "one")
    assert found.failures == {"clip_failure": counted, "captioner_failure": {}}
    assert list(found.values) == ["clip_score"]
    assert sum(found.values["clip_score"].counts) == len(accepted) - sum(counted.values())
    assert found.captions["vlm"] == sum(row["key"][0] < "8" for row in accepted)
    assert (found.captions["short"], found.words["vlm"].mean) == (len(accepted), 2)
    draw(found, tmp_path / "summary.png")
    both = summed("one", "other", columns=("score",))
    assert list(both.values) == ["clip_score (one)", "clip_score (other)", "score"]
    assert both.failures == {"clip_failure (one)": counted, "clip_failure (other)": counted}
    assert both.values["clip_score (one)"] == found.values["clip_score"]
    assert summed().failures == {}
    scored(prepared, "shuffled", key=lambda keys: pa.array(keys[::-1]), clip_score=value)
    with pytest.raises(DataError, match="not of the samples that its index holds"):
        summed("shuffled")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "of", "least", "mean", "most"),
    [
        ([0, 2**63, 2**64 - 1], pa.uint64(), 0, 2**63, 2**64),
        ([2**64 - 1] * 3, pa.uint64(), 2**64, 2**64, 2**64),
        ([2**24 + 1, None, 2**24 + 3], pa.int64(), 2**24 + 1, 2**24 + 2, 2**24 + 3),
        ([1e17, 1e17 + 16], pa.float64(), 1e17, 1e17, 1e17 + 16),
        ([-1.7e308, 1.7e308, 1.7e308, 1.7e308], pa.float64(), -1.7e308, 0.85e308, 1.7e308),
        ([0.0, 5e-324], pa.float64(), 0, 0, 5e-324),
        ([0.25, float("nan"), float("inf"), 0.75], pa.float32(), 0.25, 0.5, 0.75),
        ([True, None, False], pa.bool_(), 0, 0.5, 1),
    ],
)
def test_numbers_of_every_size_have_a_histogram(
    values: list[Any], of: pa.DataType, least: float, mean: float, most: float, tmp_path: Path
) -> None:
    numbers = statistics._numbers("column", pa.chunked_array([pa.array(values, of)]))
    found = statistics._evenly(numbers)
    assert (found.least, found.most) == (least, most) and found.mean == pytest.approx(mean)
    assert sum(found.counts) == len(numbers) == len([v for v in values if v is not None and np.isfinite(float(v))])
    assert np.all(np.diff(found.edges) > 0)


def rewritten(prepared: tuple[Store, Plan], folder: Path, change: Callable[[dict[str, Any], int], Any]) -> Store:
    """A store with other rows in its indexes than `prepare` would write."""
    store, plan = prepared
    other = open_store(str(folder))
    for entry in store.list():
        other.put(entry.key, store.get(entry.key))
    for shard in list_shards(store, shard_prefix(plan.digest, "16")):
        table = read_index(store, shard)
        rows = [row | change(row, number) for number, row in enumerate(table.to_pylist())]
        data = parquet_bytes(pa.Table.from_pylist(rows, schema=table.schema))
        changed = shard.model_copy(update={"index": put_data(other, "data/16", f"{shard.number:05d}.parquet", data)})
        other.put(shard_key(plan.digest, "16", shard.number), changed.model_dump_json().encode())
        assert isinstance(changed, ShardRecord)
    return other


def test_the_largest_numbers_can_be_drawn(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store = rewritten(
        prepared,
        tmp_path / "store",
        lambda row, number: {"phash": 2**64 - 1 - number, "score": (-1) ** number * 1.7e308},
    )
    found = summarise(store, prepared[1].digest, prepared[1].edition, "16", columns=["phash", "score"])
    assert {sum(histogram.counts) for histogram in found.values.values()} == {found.accepted}
    assert (found.values["phash"].most, found.values["score"].least) == (2.0**64, -1.7e308)
    draw(found, tmp_path / "summary.png")


def hostile(row: dict[str, Any], number: int) -> dict[str, Any]:
    text = HOSTILE[number % len(HOSTILE)]
    captions = [{"kind": text[:50], "text": text}, {"kind": "b", "text": HOSTILE[1]}]
    return {"captions": captions[: number % 3], "licence": text, "source": text[:60] or "s", "format": text or None}


def test_hostile_texts_are_drawn_as_text(
    prepared: tuple[Store, Plan], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    store, plan = rewritten(prepared, tmp_path / "store", hostile), prepared[1]
    found = summarise(store, plan.digest, plan.edition, "16", columns=["objects", "score", "row", "length"])
    draw(found, tmp_path / "summary.png")
    with Image.open(tmp_path / "summary.png") as image:
        assert image.width > 1200 and image.height > 1000
        assert len(set(image.convert("L").resize((100, 100)).tobytes())) > 20
    assert contact_sheet(store, plan.digest, plan.edition, "16", tmp_path / "sheet.png", count=25) == 25
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_summary_of_nothing_can_be_drawn(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    def rejected(row: dict[str, Any], number: int) -> dict[str, Any]:
        return dict.fromkeys(("width", "height", "length")) | {"accepted": False, "cause": "missing"}

    store, plan = rewritten(prepared, tmp_path / "store", rejected), prepared[1]
    for shard in list_shards(store, shard_prefix(plan.digest, "16")):
        none = shard.model_copy(update={"tar": None, "accepted": 0, "rejected": {"missing": shard.inputs}})
        store.put(shard_key(plan.digest, "16", shard.number), none.model_dump_json().encode())
    found = summarise(store, plan.digest, plan.edition, "16", columns=["score"])
    assert (found.accepted, found.words, found.aspect.mean) == (0, {}, None)
    draw(found, tmp_path / "summary.png")
    assert contact_sheet(store, plan.digest, plan.edition, "16", tmp_path / "sheet.png") == 0


def test_what_lies_beyond_the_bins_counts_in_the_last(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store = rewritten(prepared, tmp_path, lambda row, number: {"original_width": 90_000, "original_height": 2})
    found = summarise(store, prepared[1].digest, prepared[1].edition, "16")
    assert found.aspect.counts[-1] == found.shorter_side.counts[0] == found.accepted
    assert found.aspect.most == 45_000


def test_a_corpus_of_names_does_not_fill_memory(
    prepared: tuple[Store, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "MOST_NAMES", 5)
    store = rewritten(prepared, tmp_path, lambda row, number: {"licence": row["key"]})
    found = summarise(store, prepared[1].digest, prepared[1].edition, "16")
    assert len(found.licences) == 6 and sum(found.licences.values()) == found.accepted
    assert next(iter(found.licences)) == statistics.OTHERS


def test_a_sheet_shows_the_same_samples_for_the_same_seed(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = prepared
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        assert contact_sheet(store, plan.digest, plan.edition, "16", path, count=12, seed=seed) == 12
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again and first != other
    accepted = sum(row["accepted"] for row in rows_of(store, plan))
    assert contact_sheet(store, plan.digest, plan.edition, "16", paths[0], count=1000) == accepted


def test_a_sheet_shows_the_samples_themselves(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = prepared
    accepted = [row for row in rows_of(store, plan) if row["accepted"]]
    contact_sheet(store, plan.digest, plan.edition, "16", tmp_path / "all.png", count=len(accepted), columns=6)
    with Image.open(tmp_path / "all.png") as image:
        shown = image.convert("RGB")
    top = 0
    for number, row in enumerate(accepted):
        shard = next(s for s in list_shards(store, shard_prefix(plan.digest, "16")) if _holds(store, s, row["key"]))
        assert shard.tar is not None
        data = store.get(shard.tar.key, row["offset"], row["offset"] + row["length"])
        wanted = sheet.fitted(data, (samples.CELL, samples.CELL))
        left = sheet.MARGIN + number % 6 * (samples.CELL + sheet.GAP)
        top = _top(shown, wanted, left, top)  # in the same line as the one before, or in one further down


def _top(shown: Image.Image, wanted: Image.Image, left: int, least: int) -> int:
    """How far down the picture is, beginning at `least`."""
    column = np.asarray(shown)[least:, left : left + wanted.width]
    pixels = np.asarray(wanted)
    for top in np.flatnonzero((column[:, 0] == pixels[0, 0]).all(-1)):
        if np.array_equal(column[top : top + len(pixels)], pixels):
            return least + int(top)
    raise AssertionError(f"the picture is not at {left} below {least}")


def _holds(store: Store, shard: ShardRecord, key: str) -> bool:
    return key in read_index(store, shard, ["key"])["key"].to_pylist()


def test_an_image_that_cannot_be_read_leaves_the_rest(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store = rewritten(prepared, tmp_path / "store", lambda row, number: {"length": 40} if number % 2 else {})
    assert contact_sheet(store, prepared[1].digest, prepared[1].edition, "16", tmp_path / "sheet.png", count=10) == 10

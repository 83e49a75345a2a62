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

from data_prep import look
from data_prep.look import contact_sheet, draw, summarise
from data_prep.plan import Plan
from infra.errors import DataError, SettingsError
from infra.records import ShardRecord, put_data
from infra.shards import list_shards, parquet_bytes, read_index, shard_key, shard_prefix
from infra.store import Store, open_store
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus

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
    assert found.words["long"].counts == np.histogram(words, look.WORDS)[0].tolist()
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
    monkeypatch.setattr(look, "MOST_NAMES", 5)
    store = rewritten(prepared, tmp_path, lambda row, number: {"licence": row["key"]})
    found = summarise(store, prepared[1].digest, prepared[1].edition, "16")
    assert len(found.licences) == 6 and sum(found.licences.values()) == found.accepted
    assert next(iter(found.licences)) == look.OTHERS


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
    with Image.open(tmp_path / "all.png") as sheet:
        places = _picture_places(sheet, len(accepted), columns=6)
        for row, place in zip(accepted, places, strict=True):
            shard = next(s for s in list_shards(store, shard_prefix(plan.digest, "16")) if _holds(store, s, row["key"]))
            assert shard.tar is not None
            data = store.get(shard.tar.key, row["offset"], row["offset"] + row["length"])
            wanted = look._picture(data)
            shown = sheet.convert("RGB").crop((*place, place[0] + wanted.width, place[1] + wanted.height))
            assert shown.tobytes() == wanted.tobytes()


def _picture_places(sheet: Image.Image, count: int, columns: int) -> list[tuple[int, int]]:
    rows = -(-count // columns)
    step = (sheet.height - 2 * look.MARGIN - 34 + look.GAP) // rows
    across = look.CELL + look.GAP
    return [(look.MARGIN + n % columns * across, look.MARGIN + 34 + n // columns * step) for n in range(count)]


def _holds(store: Store, shard: ShardRecord, key: str) -> bool:
    return key in read_index(store, shard, ["key"])["key"].to_pylist()


def test_an_image_that_cannot_be_read_leaves_the_rest(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    store = rewritten(prepared, tmp_path / "store", lambda row, number: {"length": 40} if number % 2 else {})
    assert contact_sheet(store, prepared[1].digest, prepared[1].edition, "16", tmp_path / "sheet.png", count=10) == 10

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan import Plan
from data_prep.snapshot import SnapshotSettings, caption_mix, snapshot, snapshot_key
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.records import SnapshotRecord
from infra.shards import CAPTIONS, list_shards, read_index, read_selection, shard_key, shard_prefix
from infra.store import Store, open_store
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus

COUNT = 60


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    folder = tmp_path_factory.mktemp("snapshot")
    write_corpus(folder / "corpus", COUNT)
    store = open_store(str(folder / "store"))
    return store, prepare_here(store, settings_for(folder / "corpus"))


def made(prepared: tuple[Store, Plan], **settings: Any) -> tuple[SnapshotRecord, pa.Table, pa.Table]:
    store, plan = prepared
    record = snapshot(store, plan.digest, parse(SnapshotSettings, {"size": 16} | settings))
    return record, read_selection(store, record), read_selection(store, record, held_out=True)


def index(prepared: tuple[Store, Plan], size: int = 16) -> pa.Table:
    store, plan = prepared
    return pa.concat_tables([read_index(store, r) for r in list_shards(store, shard_prefix(plan.digest, str(size)))])


def test_everything_accepted_is_selected_in_order_and_can_be_read(prepared: tuple[Store, Plan]) -> None:
    record, training, held_out = made(prepared)
    accepted = index(prepared).filter(pa.compute.field("accepted"))
    assert training["key"].to_pylist() == accepted["key"].to_pylist()
    assert (record.rows, record.held_out_rows, held_out.num_rows) == (training.num_rows, 0, 0)
    for row in training.to_pylist():
        image = prepared[0].get(row["tar"], row["offset"], row["offset"] + row["length"])
        assert image.startswith(b"\xff\xd8\xff")
        assert sum(row["caption_weights"]) == pytest.approx(1)
        assert len(row["captions"]) == len(row["caption_weights"]) == 2


def test_counts_follow_the_conditions(prepared: tuple[Store, Plan]) -> None:
    rows = [row for row in index(prepared).to_pylist() if row["accepted"]]
    text = "objects in (1, 2) and score < 0.5 and not duplicate"
    record, training, _ = made(prepared, filter=text)
    left = [rows]
    left.append([row for row in left[-1] if row["objects"] in (1, 2)])
    left.append([row for row in left[-1] if row["score"] < 0.5])
    labels = [label for label, _ in record.counts]
    assert labels == ["accepted", "objects in (1, 2)", "score < 0.5", "not duplicate", "has a caption of the mix"]
    assert [count for _, count in record.counts][:3] == [len(part) for part in left]
    assert training.num_rows == record.counts[-1][1]


def test_of_every_pair_of_duplicates_one_is_left(prepared: tuple[Store, Plan]) -> None:
    rows = {row["key"]: row for row in index(prepared).to_pylist() if row["accepted"]}
    _, training, _ = made(prepared, filter="not duplicate")
    hashes = [rows[key]["pixels_sha256"] for key in training["key"].to_pylist()]
    assert sorted(hashes) == sorted({row["pixels_sha256"] for row in rows.values()})
    assert len(hashes) < len(rows)


def test_held_out_depends_on_the_key_alone(prepared: tuple[Store, Plan]) -> None:
    every = set(made(prepared)[1]["key"].to_pylist())
    before: set[str] = set()
    for fraction in (0.0, 0.1, 0.3, 0.6, 0.99):
        _, training, held_out = made(prepared, held_out=fraction)
        here = set(held_out["key"].to_pylist())
        assert not here & set(training["key"].to_pylist())
        assert here | set(training["key"].to_pylist()) == every
        assert before <= here
        before = here
        _, _, filtered = made(prepared, held_out=fraction, filter="objects in (1, 2)", size=32)
        assert set(filtered["key"].to_pylist()) <= here
    assert abs(len(made(prepared, held_out=0.3)[2]) / len(every) - 0.3) < 0.2


def test_caption_mix_of_a_snapshot(prepared: tuple[Store, Plan]) -> None:
    _, training, _ = made(prepared, captions={"short": 3, "long": 1})
    assert training["caption_weights"].to_pylist() == [[0.75, 0.25]] * training.num_rows
    _, training, _ = made(prepared, captions={"long": 1})
    assert all(texts[0].startswith("a long caption") for texts in training["captions"].to_pylist())
    with pytest.raises(SettingsError, match=r"kind `shrot`.*did you mean `short`"):
        made(prepared, captions={"shrot": 1})


KINDS = ("a", "b", "c")
CAPTION_ROWS = st.lists(
    st.lists(st.fixed_dictionaries({"kind": st.sampled_from(KINDS), "text": st.text()}), max_size=5)
)
MIX = st.dictionaries(st.sampled_from((*KINDS, "d")), st.floats(0, 10).filter(lambda w: w == 0 or w > 1e-3))


@given(CAPTION_ROWS, MIX)
def test_weights_follow_the_mix(rows: list[list[dict[str, str]]], mix: dict[str, float]) -> None:
    rows = [[{k: v.encode(errors="replace").decode() for k, v in c.items()} for c in row] for row in rows]
    texts, weights, kinds = caption_mix(pa.array(rows, CAPTIONS), mix)
    assert kinds == {caption["kind"] for row in rows for caption in row}
    for row, said, shares in zip(rows, texts.to_pylist(), weights.to_pylist(), strict=True):
        wanted = {kind: mix.get(kind, 0) if mix else 1 for kind in {caption["kind"] for caption in row}}
        kept = [caption for caption in row if wanted[caption["kind"]] > 0]
        assert said == [caption["text"] for caption in kept]
        for kind in {caption["kind"] for caption in kept}:
            share = sum(s for s, caption in zip(shares, kept, strict=True) if caption["kind"] == kind)
            assert share == pytest.approx(wanted[kind] / sum(wanted.values()), rel=1e-4)


def test_a_snapshot_is_made_once_and_named_by_its_settings(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    settings = SnapshotSettings(size=16, filter="objects == 1")
    first = snapshot(store, plan.digest, settings)
    before = {entry.key for entry in store.list()}
    assert snapshot(store, plan.digest, settings) == first
    assert {entry.key for entry in store.list()} == before
    store.delete(snapshot_key(plan.digest, settings))
    assert snapshot(store, plan.digest, settings) == first
    assert {entry.key for entry in store.list()} == before, "the same bytes have the same names"
    assert snapshot_key(plan.digest, settings) != snapshot_key(plan.digest, SnapshotSettings(size=16))


def test_errors_say_what_to_do(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean `objects`"):
        made(prepared, filter="object == 1")
    with pytest.raises(DataError, match=r"no sample is left \(accepted: .*objects == 77: 0"):
        made(prepared, filter="objects == 77")
    with pytest.raises(DataError, match="no shards of size 64"):
        made(prepared, size=64)
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "corpus"))
    store.delete(shard_key(plan.digest, "16", 1))
    with pytest.raises(DataError, match="only 2 of 3 shards"):
        snapshot(store, plan.digest, SnapshotSettings(size=16))


def test_sources_may_keep_different_columns(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_corpus(tmp_path / name, 10)
    one = settings_for(tmp_path / "one").sources[0].model_dump()
    two = one | {"name": "other", "url": str(tmp_path / "two"), "keep": ["score"]}
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "one", sources=[one, two]))
    record = snapshot(store, plan.digest, SnapshotSettings(size=16, filter="objects >= 0"))
    assert record.counts[0][1] == 2 * record.counts[1][1] > 0
    record = snapshot(store, plan.digest, SnapshotSettings(size=16, filter="source == 'other' and objects is None"))
    assert record.rows == record.counts[1][1] > 0

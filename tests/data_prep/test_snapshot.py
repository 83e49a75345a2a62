from __future__ import annotations

import itertools
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prepare.plan import Plan, PrepareSettings, make_plan
from data_prep.prepare.shard import make_shard, plain_outcomes
from data_prep.scores.job import Place
from data_prep.snapshots import dedup
from data_prep.snapshots.build import snapshot, snapshot_key
from data_prep.snapshots.captions import CaptionRule, appended, caption_mix, word_counts
from data_prep.snapshots.settings import SnapshotSettings
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.records import ScoreRecord, SnapshotRecord, get_data, put_data, write_record
from infra.shards import (
    CAPTIONS,
    SELECTION_SCHEMA,
    list_shards,
    parquet_bytes,
    read_index,
    read_selection,
    selection_schema,
    shard_key,
    shard_prefix,
)
from infra.store import Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import prepare_here, settings_for, shaded, write_corpus

COUNT = 60


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    folder = tmp_path_factory.mktemp("snapshot")
    write_corpus(folder / "corpus", COUNT)
    store = open_store(str(folder / "store"))
    return store, prepare_here(store, settings_for(folder / "corpus"))


def made(prepared: tuple[Store, Plan], **settings: Any) -> tuple[SnapshotRecord, pa.Table, pa.Table]:
    store, plan = prepared
    record = snapshot(store, plan.digest, plan.edition, parse(SnapshotSettings, {"size": 16} | settings))
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
    for fraction in (0.0, 0.1, 0.3, 0.6, 0.8):
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
    mixed = caption_mix(pa.array(rows, CAPTIONS), mix, encoded(["a"] * len(rows)))
    assert mixed.kinds == {caption["kind"] for row in rows for caption in row}
    for row, said, shares in zip(rows, mixed.texts.to_pylist(), mixed.weights.to_pylist(), strict=True):
        wanted = {kind: mix.get(kind, 0) if mix else 1 for kind in {caption["kind"] for caption in row}}
        kept = [caption for caption in row if wanted[caption["kind"]] > 0]
        assert said == [caption["text"] for caption in kept]
        for kind in {caption["kind"] for caption in kept}:
            share = sum(s for s, caption in zip(shares, kept, strict=True) if caption["kind"] == kind)
            assert share == pytest.approx(wanted[kind] / sum(wanted.values()), rel=1e-4)


RULES = st.lists(
    st.builds(
        CaptionRule,
        weight=st.sampled_from([0.0, 0.5, 3.0]),
        source=st.sampled_from([None, "one", "two"]),
        kind=st.sampled_from([None, *KINDS]),
        words=st.sampled_from([None, (0, 1), (2, 3), (2, None)]),
    ),
    min_size=1,
    max_size=4,
)


@given(CAPTION_ROWS, RULES, st.data())
def test_a_caption_belongs_to_the_first_rule_that_fits_it(rows: Any, rules: list[CaptionRule], data: Any) -> None:
    texts = st.sampled_from(["", "one", "two words", "and three words", " five  of\nthem are\there "])
    rows = [[{**caption, "text": data.draw(texts)} for caption in row] for row in rows]
    sources = [data.draw(st.sampled_from(["one", "two"])) for _ in rows]
    mixed = caption_mix(pa.array(rows, CAPTIONS), rules, encoded(sources))
    for row, source, said, shares in zip(
        rows, sources, mixed.texts.to_pylist(), mixed.weights.to_pylist(), strict=True
    ):
        taken = [next((n for n, rule in enumerate(rules) if fits(rule, source, caption)), None) for caption in row]
        weight = [0.0 if n is None else rules[n].weight / taken.count(n) for n in taken]
        kept = [(caption["text"], w) for caption, w in zip(row, weight, strict=True) if w]
        assert said == [text for text, _ in kept]
        assert shares == pytest.approx([w / sum(weight) for _, w in kept], rel=1e-5)


def fits(rule: CaptionRule, source: str, caption: dict[str, str]) -> bool:
    low, high = rule.words or (0, None)
    words = len(caption["text"].split())
    inside = low <= words and (high is None or words <= high)
    return rule.source in (None, source) and rule.kind in (None, caption["kind"]) and inside


def encoded(sources: list[str]) -> pa.DictionaryArray:
    return pa.array(sources, pa.string()).dictionary_encode()


@given(st.lists(st.none() | st.text(st.sampled_from("ab é字\n\t"))), st.integers(0, 3))
def test_words_are_counted_as_blanks_part_them(texts: list[str | None], skipped: int) -> None:
    assert (
        word_counts(pa.array(texts, pa.string())[skipped:]).tolist()
        == [len((t or "").split()) for t in texts][skipped:]
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    """Two sources, `one` and `other`, of the same pictures."""
    folder = tmp_path_factory.mktemp("two")
    sources = []
    for name in ("one", "other"):
        write_corpus(folder / name, 40)
        sources.append(settings_for(folder / name).sources[0].model_dump() | {"name": name, "url": str(folder / name)})
    store = open_store(str(folder / "store"))
    return store, prepare_here(store, settings_for(folder / "one", sources=sources))


SETTINGS = st.fixed_dictionaries(
    {
        "filter": st.sampled_from(["", "objects in (1, 2)", "not duplicate and score < 0.8", "source == 'one'"]),
        "held_out": st.sampled_from([0.0, 0.3, 0.6]),
        "weights": st.dictionaries(st.sampled_from(["one", "other"]), st.sampled_from([0.4, 1.0, 2.0, 2.7])),
        "captions": st.sampled_from(
            [
                {},
                {"short": 3, "long": 1},
                [{"kind": "long", "source": "one", "weight": 1}, {"kind": "short", "weight": 2}],
            ]
        ),
        "readers": st.integers(1, 9),
    }
)


@settings(max_examples=20)
@given(SETTINGS)
def test_counts_add_up_and_nothing_depends_on_who_reads(two: tuple[Store, Plan], drawn: dict[str, Any]) -> None:
    record, training, held_out = made(two, **drawn)
    counts = [count for _, count in record.counts]
    before = counts[:-1] if drawn["weights"] else counts
    assert before == sorted(before, reverse=True)
    assert counts[-1] == record.rows + record.held_out_rows == training.num_rows + held_out.num_rows
    assert counts == [sum(of) for of in zip(*record.by_source.values(), strict=True)]
    by_shard = pq.read_table(pa.BufferReader(get_data(two[0], record.by_shard)))
    sums = [sum(by_shard[name].to_pylist()) for name in ("accepted", "rows", "held_out_rows")]
    assert sums == [counts[0], record.rows, record.held_out_rows]
    assert sum(record.caption_shares.values()) == pytest.approx(1 if record.rows else 0, abs=1e-5)
    for table in (training, held_out):
        assert table.schema.equals(SELECTION_SCHEMA)
        rows = table.to_pylist()
        assert [row["tar"] for row in rows] == sorted(row["tar"] for row in rows)
        assert all(sum(row["caption_weights"]) == pytest.approx(1) and row["captions"] for row in rows)
        assert {row["bucket"] for row in rows} <= {"16x16"}
    two[0].delete(snapshot_key(two[1].digest, two[1].edition, parse(SnapshotSettings, {"size": 16} | drawn)))
    assert made(two, **drawn | {"readers": 10 - drawn["readers"]})[0] == record


@settings(max_examples=20)
@given(SETTINGS)
def test_weights_list_rows_more_and_less_often(two: tuple[Store, Plan], drawn: dict[str, Any]) -> None:
    _, plain, apart = made(two, **drawn | {"weights": {}})
    _, weighted, still_apart = made(two, **drawn)
    assert still_apart.equals(apart), "what is held out has no weight"
    times = Counter(weighted["key"].to_pylist())
    rows = {row["key"]: row for row in plain.to_pylist()}
    for key, row in rows.items():
        weight = drawn["weights"].get(row["source"], 1.0)
        assert times[key] == int(weight) + (int(key[8:16], 16) / 16**8 < weight % 1)
    assert list(dict.fromkeys(weighted["key"].to_pylist())) == [key for key in rows if times[key]]
    assert [key for key, _ in itertools.groupby(weighted["key"].to_pylist())] == [key for key in rows if times[key]]
    assert set(times) <= set(rows)


def test_a_larger_weight_keeps_what_a_smaller_one_kept(two: tuple[Store, Plan]) -> None:
    before: Counter[str] = Counter()
    for weight in (0, 0.3, 0.7, 1, 1.5, 3):
        times = Counter(made(two, weights={"one": weight})[1]["key"].to_pylist())
        assert before <= times
        before = times
    assert set(Counter(made(two, weights={"one": 0})[1]["source"].to_pylist())) == {"other"}


def test_what_is_held_out_has_no_twin_in_training(two: tuple[Store, Plan]) -> None:
    pixels = {row["key"]: row["pixels_sha256"] for row in index(two).to_pylist()}

    def shared(text: str) -> set[bytes]:
        _, training, held_out = made(two, filter=text, held_out=0.5)
        return {pixels[k] for k in training["key"].to_pylist()} & {pixels[k] for k in held_out["key"].to_pylist()}

    assert shared("")
    assert not shared("not duplicate")


def test_duplicates_may_be_those_that_look_alike(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    alike = open_store(str(tmp_path)), prepared[1]
    for entry in prepared[0].list():
        alike[0].put(entry.key, prepared[0].get(entry.key))
    for shard in list_shards(alike[0], shard_prefix(alike[1].digest, "16")):  # tens of rows that differ in a few bits
        table = read_index(alike[0], shard)
        hashes = [row // 10 * 0x0123456789ABCDE | 1 << row % 10 // 4 for row in table["row"].to_pylist()]
        rows = [
            row | {"phash": h if row["accepted"] else None} for row, h in zip(table.to_pylist(), hashes, strict=True)
        ]
        data = parquet_bytes(pa.Table.from_pylist(rows, schema=table.schema))
        record = shard.model_copy(update={"index": put_data(alike[0], "data/16", f"{shard.number}.parquet", data)})
        alike[0].put(shard_key(shard.plan, "16", shard.number), record.model_dump_json().encode())
    rows = index(alike)
    left = []
    for distance in (None, 0, 4):
        gathered = dedup.Rows(distance)
        gathered.add(rows.select(dedup.columns(distance)))
        accepted = zip(rows["key"].to_pylist(), rows["accepted"].to_pylist(), gathered.duplicates(), strict=True)
        kept = made(alike, filter="not duplicate", duplicates=distance)[1]["key"].to_pylist()
        assert kept == [key for key, ok, twin in accepted if ok and not twin]
        left.append(len(kept))
    assert left[0] > left[1] > left[2] > 1


def test_the_order_in_which_shards_were_made_is_no_matter(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 30)
    wanted = settings_for(tmp_path / "corpus")
    found = []
    for step in (1, -1):
        store = open_store(str(tmp_path / f"store{step}"))
        plan = make_plan(store, wanted)
        for shard in plan.shards[::step]:
            make_shard(store, wanted, plan, shard, None, partial(plain_outcomes, settings=wanted))
        found.append(
            snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16, filter="not duplicate", held_out=0.3))
        )
    assert found[0] == found[1]


def test_each_edition_of_a_plan_has_its_own_snapshots(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    found = []
    for count in (30, 20):
        shutil.rmtree(tmp_path / "corpus", ignore_errors=True)
        write_corpus(tmp_path / "corpus", count)
        plan = prepare_here(store, settings_for(tmp_path / "corpus"))
        record, training, _ = made((store, plan), filter="not duplicate")
        names = {row["name"] for row in index((store, plan)).to_pylist() if row["key"] in training["key"].to_pylist()}
        found.append((plan, record, len(names), training.num_rows))
    (first, before, _, _), (second, after, named, rows) = found
    assert (first.digest, first.edition) != (second.digest, second.edition) and first.digest == second.digest
    assert after.counts[0][1] < before.counts[0][1] and named == rows
    store.delete(snapshot_key(first.digest, first.edition, SnapshotSettings(size=16, filter="not duplicate")))
    assert made((store, first), filter="not duplicate")[0] == before


# Scores


def scored(
    prepared: tuple[Store, Plan], scorer: str, *, skip: int | None = None, size: int = 16, **columns: Any
) -> None:
    """Side tables of one size, the smaller one; a column's values are made from the keys."""
    store, plan = prepared
    place = Place(plan.digest, str(size), scorer)
    for shard in list_shards(store, shard_prefix(plan.digest, str(size))):
        table = read_index(store, shard)
        keys = table["key"].filter(table["accepted"]).to_pylist()
        table = pa.table({"key": keys} | {name: value([*keys]) for name, value in columns.items()})
        if shard.number != skip:
            data = put_data(store, f"data/scores/{scorer}", f"{shard.number:05d}.parquet", parquet_bytes(table))
            last = table.column(table.num_columns - 1).to_pylist()
            failures = Counter(cause for cause in last if cause) if table.column_names[-1].endswith("failure") else {}
            facts = {"number": shard.number, "table": data, "rows": len(keys), "failures": failures, "versions": {}}
            write_record(store, place.key(shard.number), ScoreRecord(**place._asdict(), **facts))


def luck(key: str) -> float | None:
    return None if key.startswith("0") else int(key[:4], 16) / 16**4


def test_scores_are_columns_of_the_filter(two: tuple[Store, Plan]) -> None:
    scored(two, "lucky", clip_score=lambda keys: pa.array([luck(key) for key in keys], pa.float32()))
    record, training, _ = made(two, scores=["lucky"], filter="clip_score > 0.26 and objects == 1")
    accepted = [row for row in index(two).to_pylist() if row["accepted"]]
    passed = [row for row in accepted if (luck(row["key"]) or 0) > 0.26]
    assert record.counts[1] == ("clip_score > 0.26", len(passed))
    assert training["key"].to_pylist() == [row["key"] for row in passed if row["objects"] == 1]
    assert made(two, scores=["lucky"], filter="clip_score is None")[0].rows == len(
        [r for r in accepted if r["key"][0] == "0"]
    )
    with pytest.raises(SettingsError, match="did you mean `clip_score`"):
        made(two, scores=["lucky"], filter="clip_scor > 0")
    with pytest.raises(SettingsError, match="`clip_score`, which is no column"):
        made(two, filter="clip_score > 0.26")


def test_scored_captions_join_the_mix(two: tuple[Store, Plan]) -> None:
    def written(keys: list[str]) -> pa.Array:
        rows = [[{"kind": "vlm", "text": f"seen {key}"}] if key[-1] < "8" else [] for key in keys]
        return pa.array([row or None for row in rows], CAPTIONS)

    scored(two, "writer", captions=written)
    _, training, _ = made(two, scores=["writer"], captions={"vlm": 3, "short": 1})
    for row in training.to_pylist():
        said = [f"seen {row['key']}"] if row["key"][-1] < "8" else []
        assert row["captions"][1:] == said
        assert row["caption_weights"] == ([0.25, 0.75] if said else [1.0])
    _, training, _ = made(two, scores=["writer"], captions={"vlm": 1})
    assert all(row["captions"] == [f"seen {row['key']}"] for row in training.to_pylist())


@pytest.fixture
def unequal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Plan]:
    """Four tars of the larger size for each of the smaller one, and pictures that are too small for the larger."""
    monkeypatch.setattr(PrepareSettings, "_aim", property(lambda settings: 8 * 16**2 * 3 // 4))
    write_corpus(tmp_path / "corpus", 40)
    for number in (2, 8, 14):
        kind = ("JPEG", "PNG")[number % 2]
        (tmp_path / f"corpus/images/{number:05d}.{kind.lower()}").write_bytes(zoo.saved(shaded(number, 24), kind))
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "corpus"))
    assert plan.sizes == {"32": 4, "16": 1}
    return store, plan


def written(keys: list[str]) -> pa.Array:
    return pa.array([[{"kind": "vlm", "text": f"seen {key}"}] for key in keys], CAPTIONS)


def test_what_was_scored_at_another_size_is_found_by_key(unequal: tuple[Store, Plan]) -> None:
    scored(unequal, "small", captions=written, luck=lambda keys: pa.array([luck(key) for key in keys], pa.float32()))
    record, training, _ = made(unequal, size=32, scores=["small@16"], captions={"vlm": 1}, filter="luck is not None")
    keys = [row["key"] for row in index(unequal, 32).to_pylist() if row["accepted"]]
    assert training["key"].to_pylist() == [key for key in keys if luck(key) is not None]
    assert all(row["captions"] == [f"seen {row['key']}"] for row in training.to_pylist())
    assert record.rows
    with pytest.raises(DataError, match=r"no scores called `none@16`"):
        made(unequal, size=32, scores=["none@16"])


def test_what_was_not_scored_at_another_size_has_no_value(unequal: tuple[Store, Plan]) -> None:
    scored(unequal, "large", size=32, captions=written)
    _, training, _ = made(unequal, scores=["large@32"], captions={"vlm": 9, "short": 1})
    large = {row["key"] for row in index(unequal, 32).to_pylist() if row["accepted"]}
    rows = training.to_pylist()
    assert sum(row["key"] not in large for row in rows) == 3
    for row in rows:
        seen = row["key"] in large
        assert row["captions"][1:] == ([f"seen {row['key']}"] if seen else [])
        assert row["caption_weights"] == pytest.approx([0.1, 0.9] if seen else [1.0])
    assert made(unequal, scores=["large@32"], captions={"vlm": 1})[0].rows == len(large)


@given(st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 3)), max_size=60))
def test_captions_are_appended_in_order(lengths: list[tuple[int, int | None]]) -> None:
    def column(which: int) -> tuple[list[Any], pa.Array]:
        rows = [
            None
            if pair[which] is None
            else [{"kind": "k", "text": f"{which} {n} {m}"} for m in range(pair[which] or 0)]
            for n, pair in enumerate(lengths)
        ]
        return rows, pa.array(rows, CAPTIONS)

    (before, first), (after, second) = column(0), column(1)
    assert appended(first, second).to_pylist() == [a + (b or []) for a, b in zip(before, after, strict=True)]


def test_scores_that_do_not_fit_are_refused(two: tuple[Store, Plan]) -> None:
    def number(keys: list[str]) -> Any:
        return pa.array(np.ones(len(keys)))

    scored(two, "partly", skip=3, aesthetic=number)
    with pytest.raises(
        DataError, match=r"1 of \d+ shards have no scores `partly` \(the first is 3\).*run that `score` again"
    ):
        made(two, scores=["partly"])
    with pytest.raises(DataError, match=r"no scores called `none`: there are .*partly"):
        made(two, scores=["none"])
    scored(two, "again", score=number)
    with pytest.raises(DataError, match=r"two columns .* are called `score`"):
        made(two, scores=["again"], filter="score > 0")
    assert made(two, scores=["again"], filter="objects == 1")[0].rows, "only the filter must know which one is meant"
    scored(two, "shuffled", key=lambda keys: pa.array(keys[::-1]), aesthetic=number)
    with pytest.raises(DataError, match="not of the samples that its index holds"):
        made(two, scores=["shuffled"])
    with pytest.raises(SettingsError, match="named twice"):
        made(two, scores=["again", "again"])


def test_a_snapshot_is_made_once_and_named_by_its_settings(prepared: tuple[Store, Plan]) -> None:
    store, plan = prepared
    settings = SnapshotSettings(size=16, filter="objects == 1")
    first = snapshot(store, plan.digest, plan.edition, settings)
    before = {entry.key for entry in store.list()}
    assert snapshot(store, plan.digest, plan.edition, settings) == first
    assert {entry.key for entry in store.list()} == before
    store.delete(snapshot_key(plan.digest, plan.edition, settings))
    assert snapshot(store, plan.digest, plan.edition, settings) == first
    assert {entry.key for entry in store.list()} == before, "the same bytes have the same names"
    assert snapshot_key(plan.digest, plan.edition, settings) != snapshot_key(
        plan.digest, plan.edition, SnapshotSettings(size=16)
    )


@pytest.mark.parametrize(
    ("wanted", "step", "remedy"),
    [
        ({"filter": "width == 16 and objects == 77 and score < 2"}, "objects == 77", "loosen that condition"),
        ({"captions": [{"words": [90, None], "weight": 1}]}, "has a caption of the mix", "give `captions`"),
        ({"weights": {"small": 0}}, "as often as its source weighs", "give `weights` more"),
        ({"weights": {"small": 0}, "held_out": 0.5}, "as often as its source weighs", "give `weights` more"),
        ({"held_out": 0.999999}, "not held out", "lower `held_out`"),
    ],
)
def test_a_snapshot_without_training_rows_is_an_error(
    prepared: tuple[Store, Plan], wanted: dict[str, Any], step: str, remedy: str
) -> None:
    with pytest.raises(DataError) as error:
        made(prepared, **wanted)
    assert f"no sample is left for training after `{step}` (accepted: " in error.value.message
    assert f"{step}: 0" in error.value.message
    assert error.value.remedy.startswith(remedy)
    assert not prepared[0].exists(
        snapshot_key(prepared[1].digest, prepared[1].edition, parse(SnapshotSettings, {"size": 16} | wanted))
    )


def test_a_corpus_without_an_accepted_image_makes_no_snapshot(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 8)
    table = pq.read_table(tmp_path / "corpus" / "table.parquet")
    pq.write_table(table.slice(5, 3), tmp_path / "corpus" / "table.parquet")
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(
        DataError, match=r"no image was accepted at this size: 3 rejected \(1 missing, .*: let `url` be"
    ):
        made((store, prepare_here(store, settings_for(tmp_path / "corpus"))))


def test_errors_say_what_to_do(prepared: tuple[Store, Plan], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean `objects`"):
        made(prepared, filter="object == 1")
    with pytest.raises(DataError, match="no shards of size 64"):
        made(prepared, size=64)
    with pytest.raises(SettingsError, match="the filter does not ask: add `not duplicate`"):
        made(prepared, duplicates=2)
    with pytest.raises(SettingsError, match=r"a source called `smal`, .* did you mean `small`"):
        made(prepared, weights={"smal": 2})
    with pytest.raises(SettingsError, match=r"a source called `big`, .* sources: small"):
        made(prepared, captions=[{"source": "big", "weight": 1}])
    with pytest.raises(SettingsError, match="fewer than the fewest"):
        made(prepared, captions=[{"words": [3, 1], "weight": 1}])
    with pytest.raises(SettingsError, match=r"unknown setting `captions.*wieght.*did you mean `weight`"):
        made(prepared, captions=[{"wieght": 1}])
    write_corpus(tmp_path / "corpus", 20)
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "corpus"))
    store.delete(shard_key(plan.digest, "16", 1))
    with pytest.raises(DataError, match="only 2 of 3 shards"):
        snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16))


def test_sources_may_keep_different_columns(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_corpus(tmp_path / name, 10)
    one = settings_for(tmp_path / "one").sources[0].model_dump()
    two = one | {"name": "other", "url": str(tmp_path / "two"), "keep": ["score"]}
    store = open_store(str(tmp_path / "store"))
    plan = prepare_here(store, settings_for(tmp_path / "one", sources=[one, two]))
    record = snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16, filter="objects >= 0"))
    assert record.counts[0][1] == 2 * record.counts[1][1] > 0
    record = snapshot(
        store, plan.digest, plan.edition, SnapshotSettings(size=16, filter="source == 'other' and objects is None")
    )
    assert record.rows == record.counts[1][1] > 0


def test_tables_may_type_a_column_in_their_own_ways(tmp_path: Path) -> None:
    """A table of whole numbers beside one of fractions is what any writer makes of a column with gaps."""
    write_corpus(tmp_path / "corpus", 20)
    table = pq.read_table(tmp_path / "corpus" / "table.parquet").slice(0, 3)
    for name, score in (("whole", pa.array([1, 2, 3])), ("text", pa.array(["a", "b", "c"]))):
        at = table.schema.get_field_index("score")
        pq.write_table(table.set_column(at, "score", score), tmp_path / "corpus" / f"{name}.parquet")
    store = open_store(str(tmp_path / "store"))

    def prepared_from(*tables: str) -> Plan:
        source = settings_for(tmp_path / "corpus").sources[0].model_dump() | {"tables": list(tables)}
        return prepare_here(store, settings_for(tmp_path / "corpus", sources=[source]))

    numbers = (store, prepared_from("table.parquet", "whole.parquet"))
    assert made(numbers, filter="score >= 1")[0].rows == 3
    mixed = (store, prepared_from("table.parquet", "text.parquet"))
    assert made(mixed)[0].rows == made((store, mixed[1]), filter="objects >= 0")[0].rows > 0
    with pytest.raises(DataError, match=r"`score` is (double|string) in one table and (double|string) in another"):
        made(mixed, filter="score >= 1")


def test_labels_become_a_column_and_rows_without_one_are_left_out(prepared: tuple[Store, Plan]) -> None:
    rows = {row["key"]: row for row in index(prepared).to_pylist() if row["accepted"]}
    record, training, held_out = made(prepared, labels={"column": "objects", "classes": 9}, held_out=0.3)
    labelled = {key: row["objects"] for key, row in rows.items() if row["objects"] is not None}
    both = [*training.to_pylist(), *held_out.to_pylist()]
    assert {row["key"]: row["label"] for row in both} == labelled
    assert record.counts[-1] == ("has a label", len(labelled))
    assert training.schema.equals(selection_schema(labelled=True))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"column": "objects", "classes": 1}, "and labels of 1 classes are 0 to 0"),
        ({"column": "score", "classes": 9}, "labels are whole numbers"),
        ({"column": "objetcs", "classes": 9}, "no column of these shards"),
    ],
)
def test_labels_that_are_none_are_refused(prepared: tuple[Store, Plan], labels: dict[str, Any], says: str) -> None:
    with pytest.raises((DataError, SettingsError), match=says):
        made(prepared, labels=labels)

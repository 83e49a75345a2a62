from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prepare.plan import Plan
from data_prep.snapshots.build import snapshot, snapshot_key
from data_prep.snapshots.forget import Forgotten, ForgottenItems, ForgottenRecord, concerning, forget, read_list
from data_prep.snapshots.settings import SnapshotSettings
from infra import layout
from infra.errors import DataError, SettingsError
from infra.records import AveragesRecord, CheckpointRecord, SnapshotRecord, put_data, read_record, write_record
from infra.shards import list_shards, parquet_bytes, read_index, read_selection, shard_key, shard_prefix
from infra.store import FileStore, Store, open_store
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus

COUNT = 40


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Plan]:
    folder = tmp_path_factory.mktemp("forget")
    write_corpus(folder / "corpus", COUNT)
    store = open_store(str(folder / "store"))
    return store, prepare_here(store, settings_for(folder / "corpus"))


@pytest.fixture
def fresh(prepared: tuple[Store, Plan]) -> tuple[Store, Plan]:
    """The shards without what other tests made of them."""
    store, plan = prepared
    for prefix in (layout.FORGOTTEN.under(), "snapshots/", "training/", "imported/"):
        for entry in list(store.list(prefix)):
            store.delete(entry.key)
    return store, plan


def rows_of(prepared: tuple[Store, Plan], size: int = 16) -> list[dict[str, Any]]:
    store, plan = prepared
    shards = list_shards(store, shard_prefix(plan.digest, str(size)))
    return pa.concat_tables([read_index(store, shard) for shard in shards]).to_pylist()


def made(prepared: tuple[Store, Plan], **wanted: Any) -> SnapshotRecord:
    return snapshot(prepared[0], prepared[1].digest, prepared[1].edition, SnapshotSettings(**{"size": 16} | wanted))


def keys_in(prepared: tuple[Store, Plan], **wanted: Any) -> set[str]:
    record = made(prepared, **wanted)
    parts = [read_selection(prepared[0], record, held_out=held_out) for held_out in (False, True)]
    return {key for part in parts for key in part["key"].to_pylist()}


def twins_of(rows: list[dict[str, Any]], keys: set[str]) -> set[str]:
    pixels = {row["pixels_sha256"] for row in rows if row["key"] in keys and row["accepted"]}
    return {row["key"] for row in rows if row["pixels_sha256"] in pixels}


@settings(max_examples=15)
@given(st.data())
def test_what_is_forgotten_is_in_no_later_snapshot(prepared: tuple[Store, Plan], data: st.DataObject) -> None:
    store, _ = prepared
    for entry in [*store.list(layout.FORGOTTEN.under()), *store.list("snapshots/")]:
        store.delete(entry.key)
    wanted: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {
                "filter": st.sampled_from(["", "not duplicate", "objects > 0 and not duplicate"]),
                "held_out": st.sampled_from([0.0, 0.4]),
                "size": st.sampled_from([16, 32]),
            }
        )
    )
    rows = rows_of(prepared, wanted["size"])
    before = keys_in(prepared, **wanted)
    gone: set[str] = set()
    for _ in range(data.draw(st.integers(1, 2))):
        chosen = data.draw(st.lists(st.sampled_from([row["key"] for row in rows]), min_size=1, max_size=4))
        assert forget(store, chosen, "asked").record is not None
        gone |= set(chosen) | twins_of(rows, set(chosen))
    assert keys_in(prepared, **wanted) == before - gone, "forgotten items go, and nothing comes in their place"


@pytest.mark.parametrize("column", ["key", "name", "image_sha256", "pixels_sha256"])
def test_an_item_has_many_names(fresh: tuple[Store, Plan], column: str) -> None:
    row = next(row for row in rows_of(fresh) if row["accepted"] and not row["row"] % 10)
    item = row[column].hex().upper() if isinstance(row[column], bytes) else row[column]
    found = forget(fresh[0], [item, "nobody's.jpg", item], "asked")
    assert (found.keys, found.twins, found.unknown) == (1, 0, ["nobody's.jpg"])
    assert row["key"] not in keys_in(fresh)


def pair(fresh: tuple[Store, Plan]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two rows of the same pixels, the survivor first."""
    survivors = keys_in(fresh, filter="not duplicate")
    rows = {row["row"]: row for row in rows_of(fresh)}
    found = sorted((rows[8], rows[9]), key=lambda row: row["key"] not in survivors)
    assert found[0]["pixels_sha256"] == found[1]["pixels_sha256"]
    return found[0], found[1]


def test_a_twin_is_no_way_back_in(fresh: tuple[Store, Plan]) -> None:
    survivor, twin = pair(fresh)
    found = forget(fresh[0], [survivor["key"]], "asked")
    assert (found.keys, found.twins) == (1, 1)
    for text in ("", "not duplicate"):
        assert not {survivor["key"], twin["key"]} & keys_in(fresh, filter=text)


def test_every_picture_that_an_item_had_is_forgotten(fresh: tuple[Store, Plan], tmp_path: Path) -> None:
    """An input that changed gives its items other pictures under their old keys."""
    rows = {row["row"]: row for row in rows_of(fresh)}
    other = open_store(str(tmp_path))
    for entry in fresh[0].list():
        other.put(entry.key, fresh[0].get(entry.key))
    for shard in list_shards(other, shard_prefix(fresh[1].digest, "16")):
        table = read_index(other, shard)
        changed = [row | ({"key": rows[8]["key"]} if row["row"] == 20 else {}) for row in table.to_pylist()]
        data = parquet_bytes(pa.Table.from_pylist(changed, schema=table.schema))
        record = shard.model_copy(update={"index": put_data(other, "data/16", "changed.parquet", data)})
        other.put(shard_key(shard.plan, "16", shard.number), record.model_dump_json().encode())
    found = forget(other, [rows[8]["key"]], "asked")
    assert (found.keys, found.twins) == (1, 1)
    assert not {rows[8]["key"], rows[9]["key"]} & keys_in((other, fresh[1]))


def test_twins_may_stay_if_they_were_in_before(fresh: tuple[Store, Plan]) -> None:
    survivor, twin = pair(fresh)
    found = forget(fresh[0], [survivor["key"]], "asked", twins=False)
    assert (found.keys, found.twins) == (1, 0)
    assert twin["key"] in keys_in(fresh) and survivor["key"] not in keys_in(fresh)
    assert not {survivor["key"], twin["key"]} & keys_in(fresh, filter="not duplicate")


def test_a_plan_that_is_made_later_knows_it_too(fresh: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = fresh
    survivor, twin = pair(fresh)
    forget(store, [survivor["key"]], "asked")
    write_corpus(tmp_path / "corpus", COUNT)
    later = store, prepare_here(store, settings_for(tmp_path / "corpus", sizes=[24]))
    assert later[1].digest != plan.digest
    left = keys_in(later, size=24)
    assert left and not {survivor["key"], twin["key"]} & left, "at another size they have other pixels, and are twins"


def test_another_list_makes_no_other_snapshot(fresh: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = fresh
    wanted = SnapshotSettings(size=16)
    write_corpus(tmp_path / "other", 10)
    one = settings_for(tmp_path / "other").sources[0].model_dump() | {"name": "other"}
    other = store, prepare_here(store, settings_for(tmp_path / "other", sources=[one], sizes=[24]))
    key = next(row["key"] for row in rows_of(other, 24) if row["accepted"])
    before = made(fresh)
    forget(store, [key], "asked")
    assert made(fresh) == before and ForgottenItems(store, concerning(store, plan, "16")).lists == []
    assert [entry.key for entry in store.list("snapshots/")] == [snapshot_key(plan.digest, plan.edition, wanted)]
    forget(store, [next(row["key"] for row in rows_of(fresh) if row["accepted"])], "asked")
    after = made(fresh)
    assert len(after.forgotten) == 1 and store.exists(snapshot_key(plan.digest, plan.edition, wanted, after.forgotten))
    assert ("not forgotten", before.rows - 1) in after.counts


def test_a_list_concerns_the_editions_that_hold_its_items(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    later, table = (tmp_path / "corpus" / f"{name}.parquet" for name in ("later", "table"))
    rows = pq.read_table(table)
    pq.write_table(rows.slice(0, 8), later)
    pq.write_table(rows.slice(8), table)
    store = open_store(str(tmp_path / "store"))
    source = settings_for(tmp_path / "corpus").sources[0].model_dump() | {"tables": ["*.parquet"]}
    both = prepare_here(store, settings_for(tmp_path / "corpus", sources=[source]))
    later.unlink()
    less = prepare_here(store, settings_for(tmp_path / "corpus", sources=[source]))
    assert both.digest == less.digest and both.all_numbers("16") > less.all_numbers("16")
    [only] = both.all_numbers("16") - less.all_numbers("16")
    shard = next(s for s in list_shards(store, shard_prefix(both.digest, "16")) if s.number == only)
    key = next(row["key"] for row in read_index(store, shard).to_pylist() if row["accepted"])
    record = read_record(store, str(forget(store, [key], "asked", twins=False).record), ForgottenRecord)
    assert record.searched[shard_prefix(both.digest, "16")].found == [only]
    assert (
        len(ForgottenItems(store, concerning(store, both, "16")).lists),
        ForgottenItems(store, concerning(store, less, "16")).lists,
    ) == (1, [])
    older = {prefix: here.model_copy(update={"found": None}) for prefix, here in record.searched.items()}
    store.put(
        layout.FORGOTTEN.at(items="older"),
        record.model_copy(update={"searched": older}).model_dump_json().encode(),
    )
    assert ForgottenItems(store, concerning(store, less, "16")).lists == ["older"], (
        "a list that does not say where its items are may concern all"
    )
    assert not {key} & keys_in((store, both))


def test_a_shard_that_comes_later_is_looked_through(fresh: tuple[Store, Plan]) -> None:
    store, plan = fresh
    last = max(list_shards(store, shard_prefix(plan.digest, "16")), key=lambda shard: shard.number)
    rows = [row for row in read_index(store, last).to_pylist() if row["accepted"] and row["row"] % 10 < 8]
    place = shard_key(plan.digest, "16", last.number)
    record = store.get(place)
    store.delete(place)
    forget(store, [rows[0]["key"]], "known by its other size")
    store.put(place, record)
    assert rows[0]["key"] not in keys_in(fresh)


def test_a_list_concerns_shards_where_its_item_was_rejected(fresh: tuple[Store, Plan]) -> None:
    store, plan = fresh
    key = next(row["key"] for row in rows_of(fresh) if not row["accepted"])
    forget(store, [key], "asked for")
    assert concerning(store, plan, "16"), "made again, such a shard may hold it"


def test_lists_add_up_and_are_written_once(fresh: tuple[Store, Plan]) -> None:
    store = fresh[0]
    keys = [row["key"] for row in rows_of(fresh) if row["accepted"] and row["row"] % 10 < 8][:3]
    first = forget(store, keys[:2], "asked")
    content = store.get(str(first.record))
    assert forget(store, keys[1::-1], "asked").record == first.record
    assert store.get(str(first.record)) == content
    assert forget(store, keys[2:], "asked").record != first.record
    assert not set(keys) & keys_in(fresh)
    assert len(list(store.list(layout.FORGOTTEN.under()))) == 2


class Meanwhile(FileStore):
    """Something happens just before a record is written under a prefix."""

    def __init__(self, store: Store, prefix: str, act: Callable[[], object]) -> None:
        assert isinstance(store, FileStore)
        super().__init__(store.root)
        self.prefix, self.acts = prefix, [act]

    def create(self, key: str, data: bytes | Path) -> bool:
        if key.startswith(self.prefix) and self.acts:
            self.acts.pop()()
        return super().create(key, data)


def test_a_snapshot_that_is_made_meanwhile_is_named(fresh: tuple[Store, Plan]) -> None:
    made(fresh, size=32)
    key = next(row["key"] for row in rows_of(fresh) if row["accepted"] and row["row"] % 10 < 8)
    store = Meanwhile(fresh[0], layout.FORGOTTEN.under(), lambda: made(fresh))
    found = forget(store, [key], "asked")
    assert not store.acts and [holder.training for holder in found.snapshots] == [1, 1]


def test_a_snapshot_heeds_what_is_forgotten_meanwhile(fresh: tuple[Store, Plan]) -> None:
    key = next(row["key"] for row in rows_of(fresh) if row["accepted"])
    store = Meanwhile(fresh[0], "snapshots/", lambda: forget(fresh[0], [key], "asked"))
    record = made((store, fresh[1]))
    assert not store.acts and record.forgotten
    assert key not in read_selection(store, record)["key"].to_pylist()


def test_an_origin_names_an_item_only_where_it_is_its_own(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 20)
    table = pq.read_table(tmp_path / "corpus" / "table.parquet")
    pages = [[f"https://x.org/{number}", None, "https://corpus.org", "flickr"][number % 4] for number in range(20)]
    pq.write_table(table.append_column("page", pa.array(pages)), tmp_path / "corpus" / "table.parquet")
    one = settings_for(tmp_path / "corpus").sources[0].model_dump() | {"origin": "https://corpus.org"}
    other = one | {"name": "other", "origin_column": "page"}
    store = open_store(str(tmp_path / "store"))
    prepared = store, prepare_here(store, settings_for(tmp_path / "corpus", sources=[one, other]))
    origins = {(row["source"], row["origin"]) for row in rows_of(prepared)}
    assert {("small", "https://corpus.org"), ("other", "https://corpus.org"), ("other", "flickr")} <= origins
    found = forget(store, ["https://x.org/0", "https://corpus.org", "flickr"], "asked", twins=False)
    assert (found.keys, found.unknown) == (1, ["https://corpus.org", "flickr"])
    gone = {row["key"] for row in rows_of(prepared) if row["origin"] == "https://x.org/0"}
    assert len(gone) == 1 and not gone & keys_in(prepared)
    with pytest.raises(DataError, match="none of the 1 items"):
        forget(store, ["https://corpus.org"], "asked")


def test_a_dry_run_writes_nothing(fresh: tuple[Store, Plan]) -> None:
    key = next(row["key"] for row in rows_of(fresh) if row["accepted"])
    before = {entry.key for entry in fresh[0].list()}
    assert forget(fresh[0], [key], "asked", dry_run=True).keys == 1
    assert {entry.key for entry in fresh[0].list()} == before


def test_who_has_seen_them(fresh: tuple[Store, Plan]) -> None:
    store = fresh[0]
    holds = made(fresh, held_out=0.5)
    lacks = made(fresh, filter="objects == 77 or row == 0")
    parts = [read_selection(store, holds, held_out=held_out)["key"].to_pylist() for held_out in (False, True)]
    rows_of_lacks = read_selection(store, lacks)["key"].to_pylist()
    checkpoints = {
        "first": checkpoint(store, "training/first", holds, None),
        "second": checkpoint(store, "training/second", lacks, "training/first"),
        "third": checkpoint(store, "imported/third", lacks, "training/second"),
        "apart": checkpoint(store, "training/apart", lacks, None),
    }

    def seen(items: list[str]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        found: Forgotten = forget(store, items, "asked", twins=False, dry_run=True)
        names = {record.digest(): name for name, record in checkpoints.items()}
        for witness in found.checkpoints:
            assert witness.checkpoint.endswith(f"{names[witness.digest]}/checkpoint.json")
        holders = {holder.digest: (holder.training, holder.held_out) for holder in found.snapshots}
        return holders, {names[witness.digest]: witness.how for witness in found.checkpoints}

    others = [[key for key in part if key not in set(rows_of_lacks)] for part in parts]
    assert seen(others[0][:2]) == (
        {holds.digest(): (2, 0)},
        {"first": "trained", "second": "inherited", "third": "inherited"},
    )
    holders, witnesses = seen(others[1][:1])
    assert holders[holds.digest()] == (0, 1) and witnesses == {"first": "held_out"}
    rejected = [row["key"] for row in rows_of(fresh) if not row["accepted"]]
    assert seen(rejected) == ({}, {})

    early = checkpoints["first"].model_copy(update={"step": 0})
    facts = early.model_dump(include={"run", "step", "position", "snapshot", "start_from"})
    left = {
        layout.CHECKPOINT_AT.at(home="training/first", step=0): early,
        layout.AVERAGES.at(home="training/first", step=0): AveragesRecord(**facts, profiles={}, parts=[]),
    }
    for key, record in left.items():
        write_record(store, key, record)
    told = forget(store, others[0][:2], "asked", twins=False, dry_run=True).checkpoints
    assert {witness.checkpoint: witness.how for witness in told}.items() >= dict.fromkeys(left, "trained").items()


def checkpoint(store: Store, folder: str, data: SnapshotRecord, start_from: str | None) -> CheckpointRecord:
    before = start_from and read_record(store, f"{start_from}/checkpoint.json", CheckpointRecord).digest()
    record = CheckpointRecord(
        folder=folder, files={}, run="r", step=1, position=8, snapshot=data.digest(), start_from=before, parameters=1
    )
    write_record(store, f"{folder}/checkpoint.json", record)
    return record


def test_items_that_nobody_knows_are_an_error(fresh: tuple[Store, Plan], tmp_path: Path) -> None:
    for items in (["a", "b"], ["f" * 64]):
        with pytest.raises(DataError, match="none of the"):
            forget(fresh[0], items, "asked")
    with pytest.raises(DataError, match="none of the"):
        forget(open_store(str(tmp_path)), ["a"], "asked")
    with pytest.raises(SettingsError, match="names no items"):
        forget(fresh[0], [], "asked")
    assert not list(fresh[0].list(layout.FORGOTTEN.under()))


def test_lists_are_lines_or_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \r\nhttps://x.org/a b#c\n", encoding="utf-8")
    assert read_list(tmp_path / "a.txt") == ["one", "two", "https://x.org/a b#c"]
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")  # as some editors write it
    assert read_list(tmp_path / "marked.txt") == ["one", "two"]
    with pytest.raises(SettingsError, match="there is no file"):
        read_list(tmp_path / "none.txt")
    pq.write_table(pa.table({"x": [1], "url": ["u"]}), tmp_path / "b.parquet")
    assert read_list(tmp_path / "b.parquet") == ["u"]
    pq.write_table(pa.table({"any": [b"\x01\xff", None]}), tmp_path / "c.parquet")
    assert read_list(tmp_path / "c.parquet") == ["01ff"]
    pq.write_table(pa.table({"x": ["a"], "y": ["b"]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"no table")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("d.parquet", "e.parquet", "f.txt", "none.txt"):
        with pytest.raises(SettingsError):
            read_list(tmp_path / name)

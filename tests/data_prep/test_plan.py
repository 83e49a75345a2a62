from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.prepare.plan import Plan, PrepareSettings, make_plan, read_plan
from infra import layout
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.store import Store, open_store
from tests.data_prep.corpora import contents, settings_for, write_corpus
from tests.data_prep.test_sources import spans
from tests.data_prep.test_sources_sa1b import write_tar


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", 20)
    return tmp_path / "corpus"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_shards_are_row_ranges_that_cover_the_input_once(corpus: Path, store: Store) -> None:
    plan = make_plan(store, settings_for(corpus))
    assert [shard.number for shard in plan.shards] == [0, 1, 2]
    assert spans([shard.part for shard in plan.shards]) == [(0, 8), (8, 8), (16, 4)]
    assert plan.rows == 20
    assert read_plan(store, plan.digest, plan.edition) == plan


def test_a_plan_is_written_once(corpus: Path, store: Store) -> None:
    plan = make_plan(store, settings_for(corpus))
    before = contents(store)
    assert make_plan(store, settings_for(corpus)) == plan
    assert contents(store) == before


def test_an_edition_is_read_under_the_name_that_its_stage_tells(corpus: Path, store: Store) -> None:
    plan = make_plan(store, settings_for(corpus))
    store.put(
        layout.EDITION.at(plan=plan.digest, edition="older"),
        store.get(layout.EDITION.at(plan=plan.digest, edition=plan.edition)),
    )
    assert read_plan(store, plan.digest, "older") == replace(plan, edition="older")


def test_what_changes_results_makes_another_plan_and_nothing_else_does(
    corpus: Path, store: Store, tmp_path: Path
) -> None:
    first = make_plan(store, settings_for(corpus))
    shutil.copytree(corpus, tmp_path / "moved")
    assert make_plan(store, settings_for(tmp_path / "moved")) == first
    assert make_plan(store, settings_for(corpus, in_flight=1)) == first
    others = [
        make_plan(store, settings_for(corpus, **changes)).digest
        for changes in (
            {"sizes": [32]},
            {"quality": 90},
            {"rows_per_shard": 9},
            {"matte": (0, 0, 0)},
            {"format": "png"},
        )
    ]
    assert len({first.digest, *others}) == 6


def test_an_input_that_comes_later_extends_the_plan(corpus: Path, store: Store) -> None:
    first = make_plan(store, all_tables(corpus))
    before = contents(store)
    pq.write_table(pq.read_table(corpus / "table.parquet").slice(0, 9), corpus / "later.parquet")
    second = make_plan(store, all_tables(corpus))
    assert second.digest == first.digest
    assert second.edition != first.edition
    assert [shard for shard in second.shards if shard.part.input == "table.parquet"] == first.shards
    later = [shard for shard in second.shards if shard.part.input == "later.parquet"]
    assert [shard.number for shard in later] == [3, 4]
    assert spans([shard.part for shard in later]) == [(0, 8), (8, 1)]
    after = contents(store)
    assert {key: after[key] for key in before} == before
    assert read_plan(store, first.digest, first.edition) == replace(first, planned=5)


def test_captions_of_planned_tars_may_be_added_but_not_changed(tmp_path: Path, store: Store) -> None:
    def write_captions(name: str, ids: list[int], word: str) -> None:
        table = pa.table({"image_id": ids, "caption": [f"{word} {n}" for n in ids]})
        pq.write_table(table, tmp_path / "sa" / f"{name}.parquet")

    settings = settings_for(tmp_path, sources=[sa1b(tmp_path / "sa")])
    write_tar(tmp_path / "sa", "one.tar", 1, 2)
    write_captions("one", [1, 2], "first")
    first = make_plan(store, settings)
    write_tar(tmp_path / "sa", "two.tar", 3, 4)
    write_captions("two", [3, 4], "first")
    assert make_plan(store, settings).shards[: len(first.shards)] == first.shards
    write_captions("two", [3, 4], "other")
    with pytest.raises(SettingsError, match=r"`two.parquet` of the source `sa` has changed since it was planned"):
        make_plan(store, settings)


def sa1b(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return {"kind": "sa1b", "name": folder.name, "url": str(folder), "tables": ["*.parquet"]}


def test_captions_that_come_too_late_for_their_tars_are_told_once(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(tmp_path, sources=[sa1b(tmp_path / "late"), sa1b(tmp_path / "fine")])

    def told() -> list[str]:
        caplog.clear()
        make_plan(store, settings)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    def write_captions(where: str, *numbers: int) -> None:
        table = pa.table({"image_id": numbers, "caption": [f"picture {number}" for number in numbers]})
        pq.write_table(table, tmp_path / where / f"{numbers[0]}.parquet")

    for where in ("late", "fine"):
        write_tar(tmp_path / where, "one.tar", 1, 2)
        write_tar(tmp_path / where, "two.tar", 3, 4)
        write_captions(where, 1, 2)
    assert told() == []
    write_tar(tmp_path / "fine", "three.tar", 5, 6)
    assert told() == [], "a tar without a table of its own"
    write_captions("late", 3)
    write_captions("late", 4)
    write_tar(tmp_path / "late", "three.tar", 5, 6)
    (warning,) = told()
    assert "tables of captions of the source `late` (2) are not for its tars that are planned already (2)" in warning
    assert "stay refused; give the source another name" in warning
    assert told() == []


def test_an_input_that_changed_is_another_one(corpus: Path, store: Store) -> None:
    first = make_plan(store, settings_for(corpus))
    picture = corpus / "images" / "00001.png"
    kept = picture.read_bytes()
    picture.write_bytes(kept + b"!")
    second = make_plan(store, settings_for(corpus))
    assert [shard.number for shard in second.shards] == [3, 4, 5]
    picture.write_bytes(kept)
    assert make_plan(store, settings_for(corpus)) == replace(first, planned=6)


def test_two_that_extend_a_plan_at_once_agree(corpus: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create = store.create
    other: list[Plan] = []

    def slower(key: str, data: bytes | Path) -> bool:
        """Somebody else is first, with another input as well."""
        if not other:
            monkeypatch.setattr(store, "create", create)
            table = pq.read_table(corpus / "table.parquet")
            pq.write_table(table.slice(0, 3), corpus / "a-third.parquet")
            other.append(make_plan(store, all_tables(corpus)))
            (corpus / "a-third.parquet").unlink()
        return create(key, data)

    monkeypatch.setattr(store, "create", slower)
    plan = make_plan(store, all_tables(corpus))
    assert [shard.number for shard in other[0].shards] == [0, 1, 2, 3]
    assert plan.shards == other[0].shards[1:]


@given(aim=st.integers(1, 64), sides=st.sets(st.integers(16, 1024), min_size=1, max_size=4))
def test_shards_are_near_what_they_are_aimed_at(aim: int, sides: set[int]) -> None:
    settings = settings_for(Path("x"), sizes=sorted(sides), shard_mib=aim, rows_per_shard=None)
    for side in sides:
        mib = settings.rows / settings.shards_of(side) * side**2 * 0.75 / 2**20
        assert mib <= aim * 1.5 + side**2 / 2**20
        assert mib >= aim * 0.4 or side == min(sides)


def all_tables(corpus: Path) -> PrepareSettings:
    source = settings_for(corpus).sources[0].model_dump() | {"tables": ["*.parquet"]}
    return settings_for(corpus, sources=[source])


def test_an_empty_corpus_is_an_error(tmp_path: Path, store: Store) -> None:
    (tmp_path / "empty").mkdir()
    source = {"kind": "text_folder", "name": "e", "url": str(tmp_path / "empty")}
    with pytest.raises(DataError, match="no images"):
        make_plan(store, settings_for(tmp_path, sources=[source]))


def test_settings_that_cannot_be(corpus: Path) -> None:
    source = settings_for(corpus).sources[0].model_dump()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sources": [source, source]}, "two sources are called `small`"),
        ({"sizes": [32, 32]}, "two sizes have the same name"),
        ({"sources": [source | {"kind": "tabel_folder"}]}, "kind"),
        ({"sources": [source | {"captoins": ["x"]}]}, "did you mean `captions`"),
        ({"qualty": 3}, "did you mean `quality`"),
    ]
    for changes, message in wrong:
        with pytest.raises(SettingsError) as error:
            parse(type(settings_for(corpus)), settings_for(corpus).model_dump() | changes)
        assert message in str(error.value)


def test_a_damaged_plan_is_an_error_of_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 4)
    store, settings = open_store(str(tmp_path / "store")), settings_for(tmp_path / "corpus")
    plan = make_plan(store, settings)
    store.put(f"plans/{plan.digest}/00000.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"00000\.parquet is not a readable plan") as error:
        make_plan(store, settings)
    store.delete(f"plans/{plan.digest}/00000.parquet")
    assert "delete it" in error.value.remedy
    assert make_plan(store, settings) == plan


@pytest.mark.parametrize("wrong", [{"rows_per_shard": 10**20}, {"sizes": [10**6]}, {"shard_mib": 10**12}])
def test_settings_that_would_fill_the_memory_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        settings_for(tmp_path, **wrong)

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.plan import make_plan, plan_key, read_plan
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.store import Store, open_store
from tests.data_prep.corpora import settings_for, write_corpus


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
    assert [(shard.part.first, shard.part.rows) for shard in plan.shards] == [(0, 8), (8, 8), (16, 4)]
    assert plan.rows == 20
    assert read_plan(store, plan.digest) == plan


def test_a_plan_is_written_once(corpus: Path, store: Store) -> None:
    plan = make_plan(store, settings_for(corpus))
    before = store.get(plan_key(plan.digest))
    assert make_plan(store, settings_for(corpus)) == plan
    assert store.get(plan_key(plan.digest)) == before


def test_what_changes_results_makes_another_plan_and_nothing_else_does(
    corpus: Path, store: Store, tmp_path: Path
) -> None:
    first = make_plan(store, settings_for(corpus)).digest
    shutil.copytree(corpus, tmp_path / "moved")
    assert make_plan(store, settings_for(tmp_path / "moved")).digest == first
    assert make_plan(store, settings_for(corpus, in_flight=1)).digest == first
    others = [
        make_plan(store, settings_for(corpus, **changes)).digest
        for changes in ({"sizes": [32]}, {"jpeg_quality": 90}, {"rows_per_shard": 9}, {"matte": (0, 0, 0)})
    ]
    with (corpus / "images" / "00001.png").open("ab") as file:
        file.write(b"!")
    others.append(make_plan(store, settings_for(corpus)).digest)
    assert len({first, *others}) == 6


def test_an_empty_corpus_is_an_error(tmp_path: Path, store: Store) -> None:
    (tmp_path / "empty").mkdir()
    source = {"kind": "text_folder", "name": "e", "url": str(tmp_path / "empty")}
    with pytest.raises(DataError, match="no images"):
        make_plan(store, settings_for(tmp_path, sources=[source]))


def test_settings_that_cannot_be(corpus: Path) -> None:
    source = settings_for(corpus).sources[0].model_dump()
    for changes, message in [
        ({"sources": [source, source]}, "two sources are called `small`"),
        ({"sizes": [32, 32]}, "different from one another"),
        ({"sources": [source | {"kind": "tabel_folder"}]}, "kind"),
        ({"sources": [source | {"captoins": ["x"]}]}, "did you mean `captions`"),
        ({"jpeg_qualty": 3}, "did you mean `jpeg_quality`"),
    ]:
        with pytest.raises(SettingsError) as error:
            parse(type(settings_for(corpus)), settings_for(corpus).model_dump() | changes)
        assert message in str(error.value)

"""The page of keys: what it spells it takes apart, no two places share a key, and no kind of record is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import layout
from infra.layout import FOLDERS, PLACES, Place, place_of
from infra.records import Record

ROOT = Path(__file__).parents[2]
# Records of a folder that an export fills, and a part of another record.
ELSEWHERE = {"Begun", "Exported", "Return", "StateFile"}
WORDS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)


def parts_of(place: layout.Spelling) -> st.SearchStrategy[dict[str, str | int]]:
    fields = re.findall(r"\{(\w+)(:[^}]*)?\}", place.spelling)
    kinds = {name: st.integers(0, 10**8) if form else WORDS for name, form in fields}
    if "home" in kinds:
        kinds["home"] = WORDS.map(lambda run: layout.TRAINING.at(run=run))
    return st.fixed_dictionaries(kinds)


@given(data=st.data())
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.spelling)
def test_a_key_is_taken_apart_as_it_was_spelt(place: Place, data: st.DataObject) -> None:
    parts = data.draw(parts_of(place))
    key = place.at(**parts)
    assert place.parse(key) == parts
    assert place_of(key) is place
    assert key.startswith(place.under())
    assert not any(folder.holds(key) for folder in FOLDERS if folder.spelling.startswith(layout.DATA))


@pytest.mark.parametrize(
    "key",
    ["", "shards/p/16/1.json", "shards/p/16/00001.json.beat", "shards/00001.json", "stages/x.json", "else/a/b.json"],
)
def test_what_is_spelt_otherwise_is_of_no_place(key: str) -> None:
    assert place_of(key) is None


def test_under_goes_as_far_as_the_parts_that_are_known() -> None:
    assert layout.SHARD.under() == "shards/"
    assert layout.SHARD.under(plan="p") == "shards/p/"
    assert layout.SHARD.under(plan="p", size="16") == layout.SHARDS.at(plan="p", size="16")
    assert layout.IMAGES.named("00001", size="16") == "data/16/00001-"
    assert layout.STATE_PARTS.holds("training/r/state/x-y.safetensors")
    assert not layout.STATE_PARTS.holds("training/r/states/x.json")


def test_no_object_lies_in_two_folders() -> None:
    example = {"home": "training/r", "size": "256", "scorer": "s", "stage": "d", "encoder": "text", "part": "text"}
    for folder in FOLDERS:
        key = f"{folder.named('x', **example)}{'0' * 64}.tar"
        assert [other for other in FOLDERS if other.holds(key)] == [folder]


def test_every_kind_of_record_has_its_place() -> None:
    load_every_record()
    found = {kind.__name__ for kind in kinds_below(Record) if not kind.__module__.startswith("tests")}
    assert found - ELSEWHERE == {place.record for place in PLACES if place.record}


def load_every_record() -> None:
    for floor in ("infra", "data_prep", "training", "pipelines", "orchestration"):
        for path in (ROOT / floor).rglob("*.py"):
            if "class " in (text := path.read_text(encoding="utf-8")) and "Record" in text:
                importlib.import_module(
                    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                )


def kinds_below(kind: type[Record]) -> set[type[Record]]:
    return {kind for below in kind.__subclasses__() for kind in (below, *kinds_below(below))}

"""Records of every kind as the first version wrote them that promised to keep them readable.

    kept_records.json    the name of a record's class -> what that version wrote

Whoever changes a record adds to the file and takes nothing away: what is there is in somebody's store. Only a kind that
no place holds any longer, which nothing reads, leaves the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.layout import PLACES
from infra.records import Output, Record, read_record
from infra.store import open_store
from tests.infra.test_layout import kinds_below, load_every_record

KEPT: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name("kept_records.json").read_text("utf-8"))


def test_every_kind_of_record_and_of_stage_is_kept() -> None:
    assert KEPT.keys() == {place.record for place in PLACES if place.record}
    ours = {kind for kind, output in Output._kinds.items() if not output.__module__.startswith("tests")}
    assert {record["kind"] for record in KEPT["StageRecord"]} == ours


@pytest.mark.parametrize("name", sorted(KEPT))
def test_what_was_written_is_read_and_nothing_of_it_is_lost(name: str, tmp_path: Path) -> None:
    load_every_record()
    (kind,) = {kind for kind in kinds_below(Record) if kind.__name__ == name}
    store = open_store(str(tmp_path))
    for written in KEPT[name]:
        store.put("kept.json", json.dumps(written).encode())
        read = read_record(store, "kept.json", kind).model_dump(mode="json")
        assert within(written, read)


def within(written: Any, read: Any) -> bool:
    """Whether all that was written is read; newer fields stand beside it."""
    if isinstance(written, dict):
        return isinstance(read, dict) and all(name in read and within(written[name], read[name]) for name in written)
    return bool(written == read)

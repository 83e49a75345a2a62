from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.errors import DataError, PixnerdError, RecordError, StageFailed, StoreUnreachable
from infra.records import (
    DataObject,
    EvalReport,
    Interval,
    ShardRecord,
    StageRecord,
    fetch_data,
    get_data,
    put_data,
    read_record,
    write_record,
)
from infra.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def stage(**changes: object) -> StageRecord:
    plain = {
        "stage": "a", "kind": "gate", "digest_of_work": "d", "inputs": {}, "settings": {},
        "output": {"passed": True, "verdicts": []}, "versions": {}, "started": "2026-01-01", "seconds": 1.0, **changes,
    }  # fmt: skip
    return StageRecord.model_validate(plain)


def test_the_first_record_wins(store: Store):
    assert write_record(store, "r.json", stage(stage="first"))
    assert not write_record(store, "r.json", stage(stage="second"))
    assert read_record(store, "r.json", StageRecord).stage == "first"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff\xfe", json.dumps({"stage": "a"}).encode()]
)
def test_what_is_no_record_is_refused(store: Store, data: bytes):
    store.put("r.json", data)
    with pytest.raises(RecordError):
        read_record(store, "r.json", StageRecord)


def test_a_newer_record_is_not_half_understood(store: Store):
    plain = json.loads(stage().model_dump_json())
    store.put("r.json", json.dumps({**plain, "schema_version": 99}).encode())
    with pytest.raises(RecordError, match="schema 99"):
        read_record(store, "r.json", StageRecord)
    store.put("s.json", json.dumps({**plain, "colour": "red"}).encode())
    with pytest.raises(RecordError):
        read_record(store, "s.json", StageRecord)


@pytest.mark.parametrize("as_file", [False, True])
def test_data_is_held_against_its_name(store: Store, tmp_path: Path, as_file: bool):
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello")
    found = put_data(store, "data", "x.tar.gz", path if as_file else b"hello")
    assert found.key == f"data/x-{found.sha256}.tar.gz"
    assert get_data(store, found) == b"hello"
    fetch_data(store, found, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"hello"
    store.put(found.key, b"hellO")
    with pytest.raises(DataError, match="damaged"):
        get_data(store, found)
    with pytest.raises(DataError, match="damaged"):
        fetch_data(store, found, tmp_path / "bad")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "store", "x.bin"]


def test_a_shard_adds_up():
    index = DataObject(key="k", sha256="s", size=1)
    shard = ShardRecord(
        plan="p", size="32", number=0, tar=None, index=index, accepted=3, rejected={"truncated": 2}, versions={}
    )
    assert shard.inputs == 5


def test_errors_survive_the_way_home_from_a_worker():
    import pickle

    for kind in (StoreUnreachable, StageFailed):
        error = pickle.loads(pickle.dumps(kind("what", remedy="do this")))
        assert type(error) is kind
        assert str(error) == "what: do this"


def all_errors(kind: type[PixnerdError]) -> list[type[PixnerdError]]:
    return [kind, *(inner for sub in kind.__subclasses__() for inner in all_errors(sub))]


def test_the_error_tree_is_the_one_that_is_drawn():
    import infra.errors

    assert infra.errors.__doc__ is not None
    for kind in all_errors(PixnerdError):
        if kind.__module__ == "infra.errors":
            assert kind.__name__ in infra.errors.__doc__, f"draw {kind.__name__} in the docstring"


def test_reports_without_an_interval_are_of_a_newer_schema_and_others_are_as_they_were(tmp_path: Path):
    store = open_store(str(tmp_path))
    data = DataObject(key="a", sha256="0" * 64, size=1)
    given = {"protocol": "geneval", "judge": "j", "prompts": "p", "checkpoint": "c", "images": 1, "failed": 0}
    for low, schema in ((0.5, 1), (None, 2)):
        score = Interval(value=0.75, low=low, high=low)
        report = EvalReport(**given, scores={"a": score}, details=data, pictures=[])
        assert report.schema_version == schema
        write_record(store, f"{schema}.json", report)
        assert read_record(store, f"{schema}.json", EvalReport) == report

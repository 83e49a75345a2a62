"""Training states that killed runs leave are found and deleted; what anybody may go on from is not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from infra.records import put_data
from infra.store import FileStore
from training.leftovers import States, collect_states

DAYS = 24 * 3600.0


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def part(store: FileStore, run: str, step: int, data: bytes = b"part") -> str:
    return put_data(store, f"training/{run}/state", f"{step:08d}-00000-attempt.safetensors", data).key


def state(store: FileStore, run: str, step: int, *parts: str) -> str:
    key = f"training/{run}/states/{step:08d}-attempt.json"
    store.put(key, json.dumps({"files": [{"data": {"key": key}} for key in parts]}).encode())
    return key


def age(store: FileStore) -> None:
    for entry in store.list():
        os.utime(store.root / entry.key, (time.time() - 2 * DAYS,) * 2)


def keys(store: FileStore) -> set[str]:
    return {entry.key for entry in store.list()}


def test_states_of_a_run_that_is_done_go_and_its_checkpoint_stays(store: FileStore):
    weights = put_data(store, "training/done/checkpoint", "model.safetensors", b"weights").key
    store.put("training/done/checkpoint.json", b"{}")
    store.put("training/done/drivers/000001.json", b"{}")
    kept = keys(store)
    left = [state(store, "done", 2, part(store, "done", 2)), part(store, "done", 4, b"never named")]
    store.put("training/done/states/damaged.json", b"{")
    other = state(store, "other", 2, part(store, "other", 2))
    everything = keys(store)
    found = collect_states(store, dry_run=True)
    assert found == States(4, sum(e.size for e in store.list("training/done/state")))
    assert keys(store) == everything
    assert collect_states(store) == found
    assert keys(store) == kept | {other, part(store, "other", 2), weights}
    assert all(not store.exists(key) for key in left)


def test_parts_that_no_state_names_go_when_they_are_old(store: FileStore):
    named = [part(store, "run", 2), part(store, "run", 4)]
    records = [state(store, "run", step, key) for step, key in zip((2, 4), named, strict=True)]
    part(store, "run", 6)
    age(store)
    young = part(store, "run", 8)
    assert collect_states(store) == States(1, 4)
    assert keys(store) == {*named, *records, young}
    assert collect_states(store, 0.0) == States(1, 4)


def test_parts_of_averages_stay_if_a_record_names_them_and_go_when_they_are_old(store: FileStore):
    def share(run: str, step: int) -> str:
        name = f"{step:08d}-00000-0.safetensors"
        return put_data(store, f"training/{run}/average", name, f"{run} {step}".encode()).key

    store.put("training/done/checkpoint.json", b"{}")
    stay: set[str] = {"training/done/checkpoint.json"}
    for run in ("done", "under-way"):
        record = f"training/{run}/averages/00000002.json"
        store.put(record, json.dumps({"parts": [{"files": {"ema": {"key": share(run, 2)}}}]}).encode())
        stay |= {record, share(run, 2)}
        share(run, 4)
    age(store)
    young = share("under-way", 6)
    assert collect_states(store).objects == 2
    assert keys(store) == stay | {young}


def test_a_state_that_cannot_be_read_may_name_anything(store: FileStore):
    unnamed = part(store, "run", 2)
    store.put("training/run/states/00000002-attempt.json", b"{")
    other = part(store, "other", 2)
    age(store)
    assert collect_states(store) == States(1, 4)
    assert (store.exists(unnamed), store.exists(other)) == (True, False)


def test_a_wrong_clock_makes_nothing_old(store: FileStore, monkeypatch: pytest.MonkeyPatch):
    part(store, "run", 2)
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert collect_states(store) == States(0, 0)

"""Notes of the runs at work on a store: who is told of whom, and what becomes of what killed ones leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from infra import layout
from infra.claim import PATIENCE_SECONDS, process_of
from infra.records import write_record
from infra.store import Store, open_store
from orchestration import launch, running
from orchestration.running import Others, RunRecord, noted


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def notes(store: Store) -> list[str]:
    return [entry.key for entry in store.list(layout.RUNNING.under())]


def note_of(store: Store, process: str, host: str = "elsewhere") -> str:
    key = layout.RUNNING.at(run="other")
    run = RunRecord(workflow="demo", host=host, pid=7, process=process, since="2026-11-21 16:05 UTC")
    write_record(store, key, run)
    store.put(f"{key}.beat", b"1")
    return key


def test_a_second_run_is_told_of_the_first_and_the_other_way_round_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "BEAT_SECONDS", 0.01)
    first: list[str] = []
    second: list[str] = []
    with noted(store, "demo", first.append):
        assert first == []
        with noted(store, "mine", second.append):
            [told] = second
            assert told.startswith("another run of `demo` is at work on this store (host ")
            while not first:
                pass  # pytest's own timeout ends it
        seen_by_a_third: list[str] = []
        Others(store, seen_by_a_third.append).check()
        assert len(seen_by_a_third) == 1
    assert len(second) == 1 and len(first) == 1 and "`mine`" in first[0]
    assert notes(store) == []


def test_a_run_that_fails_leaves_no_note(store: Store):
    with pytest.raises(ValueError, match="no"), noted(store, "demo", print):
        raise ValueError("no")
    assert notes(store) == []


def test_the_note_of_a_process_that_is_gone_is_dropped_in_silence(store: Store):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        key = note_of(store, process_of(other.pid))
        told: list[str] = []
        Others(store, told.append).check()
        assert len(told) == 1
    told.clear()
    Others(store, told.append).check()  # whoever runs nothing changes nothing
    assert key in notes(store)
    with noted(store, "mine", told.append):
        assert key not in notes(store) and f"{key}.beat" not in notes(store)
    assert told == []


def test_a_run_on_another_machine_is_told_of_when_its_beat_goes_on(store: Store):
    key = note_of(store, "another-boot ns 7 1")
    told: list[str] = []
    others = Others(store, told.append, own="mine")
    others.check()
    others.check()
    assert told == []
    store.put(f"{key}.beat", b"2")
    others.check()
    others.check()
    assert len(told) == 1 and "(host elsewhere, process 7, since 2026-11-21 16:05 UTC)" in told[0]


def test_the_note_of_a_machine_that_is_gone_is_dropped_after_long_silence(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    now = 1000.0
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: now))
    key = note_of(store, "another-boot ns 7 1")
    others = Others(store, print, own="mine")
    others.check()
    now += PATIENCE_SECONDS - 1
    others.check()
    assert key in notes(store)
    now += 2
    others.check()
    assert notes(store) == []


def test_what_is_no_note_stops_nothing(store: Store):
    store.put(layout.RUNNING.at(run="broken"), b"{")
    store.put(layout.RUNNING.at(run="other"), b'{"schema_version": 99}')
    told: list[str] = []
    with noted(store, "demo", told.append):
        pass
    assert told == []


def test_a_dry_run_tells_of_a_run_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"name": "x", "stages": {"a": {"kind": "corpus"}}}))
    store = open_store(str(tmp_path / "store"))
    with noted(store, "x", print):
        launch.run(str(tmp_path / "x.yaml"), store=store.url, assignments=[], address=None, dry_run=True, as_json=False)
    told = capsys.readouterr()
    assert told.err.startswith("note: another run of `x` is at work on this store (host ")
    assert told.out.startswith("> a ")

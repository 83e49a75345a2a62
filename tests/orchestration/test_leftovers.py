"""The next run, and `data gc`, remove what killed runs left, and say how much that is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from infra.scratch import HELD, folder
from infra.store import FileStore
from orchestration import leftovers
from orchestration.commands.data import gc
from training.leftovers import States


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folders of this test alone."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.setattr("infra.scratch.places", lambda: [place])
    return place


def killed(parent: Path, name: str, size: int = 1 << 20) -> Path:
    """What a process leaves that is killed: its lock is free."""
    made = parent / name
    made.mkdir(parents=True)
    (made / HELD).touch()
    (made / "tar").write_bytes(bytes(size))
    return made


@pytest.fixture
def store(tmp_path: Path, temporary: Path) -> FileStore:
    """With what a killed driver, two killed ranks, a killed corpus and a killed publication leave."""
    store = FileStore(tmp_path / "store")
    for name in ("pixnerd-ray-a", "pixnerd-train-b", "pixnerd-train-c"):
        killed(temporary, name)
    killed(store.root / "corpus", "pixnerd-corpus-d")
    (store.root / "corpus" / "0123456789abcdef").mkdir()
    store.put("training/x/checkpoint.json", b"{}")
    store.put("training/x/state/part.safetensors", bytes(1 << 20))
    return store


def test_all_of_it_is_found_and_told(store: FileStore, temporary: Path):
    with folder("train", temporary) as used:
        assert str(leftovers.remove(store, dry_run=True)) == (
            "4 folders, 4.0 MiB of temporary files; 1 objects, 1.0 MiB of training states"
        )
        assert len(list(temporary.iterdir())) == 4
        leftovers.remove(store)
        assert list(temporary.iterdir()) == [used]
    assert [path.name for path in (store.root / "corpus").iterdir()] == ["0123456789abcdef"]
    assert str(leftovers.remove(store)) == ""


def test_gc_tells_and_deletes(store: FileStore, temporary: Path, capsys: pytest.CaptureFixture[str]):
    gc(store.url, older_than_hours=24.0, dry_run=True, json_=False)
    assert "would delete of what killed runs had left: 4 folders, 4.0 MiB" in capsys.readouterr().out
    assert len(list(temporary.iterdir())) == 3
    gc(store.url, older_than_hours=24.0, dry_run=False, json_=True)
    found = json.loads(capsys.readouterr().out)
    assert found["temporary"] == {"folders": 4, "bytes": 4 << 20}
    assert found["states"] == States(1, 1 << 20)._asdict()
    assert list(temporary.iterdir()) == []
    gc(store.url, older_than_hours=24.0, dry_run=False, json_=False)
    assert "killed runs have left nothing else" in capsys.readouterr().out

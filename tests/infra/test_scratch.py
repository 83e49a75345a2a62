"""Temporary folders: held ones stay, those of the dead go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from infra import scratch
from infra.scratch import HELD, STALE_SECONDS, Removed, everything_in, folder, sweep

HOLDER = """
import sys
from pathlib import Path
from infra.scratch import folder
with folder("train", Path(sys.argv[1])) as made:
    (made / "part").mkdir()
    (made / "part" / "tar").write_bytes(b"x" * 1000)
    print(made, flush=True)
    sys.stdin.read()
"""


def age(path: Path) -> None:
    for below in (*path.rglob("*"), path):
        os.utime(below, (time.time() - STALE_SECONDS - 60,) * 2)


def test_a_folder_is_there_while_it_is_needed(tmp_path: Path):
    with folder("run", tmp_path) as made:
        (made / "file").write_bytes(b"x")
        assert sweep([tmp_path]) == Removed(0, 0)
        assert (made / "file").exists()
    assert list(tmp_path.iterdir()) == []


def test_it_goes_after_an_error_as_well(tmp_path: Path):
    def fail() -> None:
        with folder("run", tmp_path) as made:
            (made / "below").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_holds_stays_until_that_is_killed(tmp_path: Path):
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        made = Path(holder.stdout.readline().strip())
        age(made)  # its age says nothing
        assert sweep([tmp_path]) == Removed(0, 0)
        holder.kill()
    assert (made / "part" / "tar").exists()
    assert sweep([tmp_path], dry_run=True) == Removed(1, 1000)
    assert (made / "part" / "tar").exists()
    assert sweep([tmp_path]) == Removed(1, 1000)
    assert list(tmp_path.iterdir()) == []
    assert sweep([tmp_path]) == Removed(0, 0)


def test_what_older_versions_left_goes_when_it_is_old(tmp_path: Path):
    for name in ("pixnerd-train-old", "pixnerd-train-new", "pixnerd-train-used", "somebody-s"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tar").write_bytes(b"x" * 10)
        if name != "pixnerd-train-new":
            age(tmp_path / name)
    (tmp_path / "pixnerd-train-used" / "tar").touch()
    assert sweep([tmp_path]) == Removed(1, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pixnerd-train-new", "pixnerd-train-used", "somebody-s"]


def test_a_wrong_clock_makes_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pixnerd-train-new").mkdir()
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert sweep([tmp_path]) == Removed(0, 0)


def test_links_are_not_followed(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"x")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "pixnerd-train-x").symlink_to(tmp_path / "mine")
    left = tmp_path / "there" / "pixnerd-train-y"
    left.mkdir()
    (left / HELD).touch()
    (left / "link").symlink_to(tmp_path / "mine")
    assert sweep([tmp_path / "there"]).folders == 1
    assert (tmp_path / "mine" / "file").exists()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["pixnerd-train-x"]


def test_a_killed_removal_leaves_what_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with folder("run", tmp_path) as made:
        (made / "b").mkdir()
        shutil.copytree(made, tmp_path / "pixnerd-run-copy")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as far as the kill let it come
    sweep([tmp_path])
    assert (tmp_path / "pixnerd-run-copy" / "b").exists()
    monkeypatch.undo()
    assert sweep([tmp_path]).folders == 1


def test_all_temporary_files_are_made_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with folder("run", tmp_path) as made, everything_in(made):
        code = "import tempfile; print(tempfile.gettempdir())"
        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert there == tempfile.gettempdir() == str(made)
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == Path(before[0])  # compiled networks outlive it
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == before


def test_rays_folder_is_in_a_short_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", "/a/folder/with/a/long/name")
    assert scratch.short_place() == Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    assert scratch.short_place() == Path("/short")

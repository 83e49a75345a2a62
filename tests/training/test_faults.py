"""Faults in real ranks under a real Ray, each survived, each told, none longer than the watchdog."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra import guard
from infra.errors import SettingsError, StoreError
from infra.records import CheckpointRecord, DataObject, SnapshotRecord
from infra.store import FileStore
from tests.training import small_run
from training import ray_train, states
from training.job import Job
from training.model import WEIGHTS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
Made = tuple[FileStore, SnapshotRecord, dict[str, dict[str, DataObject]]]
STEPS: dict[str, Any] = {"workers": 2, "steps": 40, "save_every": 4, "log_every": 4, "objective": {"repa": 0.0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("run")
    store = FileStore(folder / "store")
    return store, small_run.write_data(folder / "corpus", store), small_run.write_encoders(folder / "encoders", store)


@pytest.fixture(scope="module")
def undisturbed(made: Made, ray_cluster: str) -> CheckpointRecord:
    return ray_train.fit(small_run.job_in(*made, name="undisturbed", **STEPS), lambda message: None)


def ranks() -> list[int]:
    """The processes of the ranks of this process's own Ray: other runs on the machine are not to be disturbed."""
    pids = []
    for raylet in guard.children(os.getpid()):
        for pid in guard.children(raylet):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                    pids.append(pid)
    return sorted(pids)


class Disturbed:
    """Shows a run's messages, and does something to each of its first attempts behind a state."""

    def __init__(self, disturb: Callable[[int], None], times: int) -> None:
        self._disturb, self._left, self._times = disturb, times, times
        self.told: list[str] = []
        self.steps: list[int] = []

    def __call__(self, message: dict[str, Any]) -> None:
        if message["event"] == "told":
            self.told.append(message["text"])
        if message["event"] == "log":
            self.steps.append(message["step"])
        fresh = self._left + len(self.told) == self._times  # not disturbed yet: what is dying may still log
        if message["event"] == "log" and self._left and fresh and message["step"] >= 8:
            self._left -= 1
            self._disturb(self._left)


def test_a_killed_rank_brings_all_back(made: Made, undisturbed: CheckpointRecord):
    signals = [signal.SIGTERM, signal.SIGKILL]
    show = Disturbed(lambda left: os.kill(ranks()[0], signals[left]), times=2)
    record = ray_train.fit(small_run.job_in(*made, name="killed", **STEPS, retries=1), show)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    assert len(show.told) == 2
    assert all("starting again from the last committed state" in text for text in show.told)


def test_a_stopped_rank_is_noticed_and_named(made: Made, undisturbed: CheckpointRecord):
    show = Disturbed(lambda left: os.kill(ranks()[-1], signal.SIGSTOP), times=1)
    began = time.monotonic()
    record = ray_train.fit(small_run.job_in(*made, name="stopped", **STEPS, hang_after=20), show)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    [told] = show.told
    assert "training stood still (" in told
    assert "has taken no step for 20 s" in told
    assert "nothing was heard of rank" in told
    assert time.monotonic() - began < 300


class StuckOnce(FileStore):
    """The first read of a sample never ends."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if key.endswith(".tar") and self._mark.exists():
            self._mark.unlink()
            threading.Event().wait()
        return super().get(key, start, end)

    def download(self, key: str, path: Path) -> None:
        while key.endswith(".tar") and self._mark.exists():  # else nobody would read by range
            threading.Event().wait(0.05)
        super().download(key, path)

    @property
    def _mark(self) -> Path:
        return Path(self.root) / "stuck"


def test_a_rank_that_is_stuck_in_a_read_says_so(made: Made, undisturbed: CheckpointRecord, tmp_path: Path):
    store, snapshot, encoders = made
    (Path(store.root) / "stuck").touch()
    show = Disturbed(lambda left: None, times=0)
    reading = {"lanes": 4, "cache": str(tmp_path)}  # an empty one, so that it must read from the store
    job = small_run.job_in(StuckOnce(store.root), snapshot, encoders, "stuck", **STEPS, hang_after=20, reading=reading)
    record = ray_train.fit(job, show)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    [told] = show.told
    assert told.count("has taken no step for 20 s") == 2
    assert "from result in batches.py" in told  # the one that waits for its data
    assert "from step in engine.py" in told  # and the one that waits for it


def test_a_store_that_is_away_for_longer_than_it_is_waited_for(made: Made, undisturbed: CheckpointRecord):
    """Its calls wait a while by themselves; then the run starts again until it is back."""
    store, snapshot, encoders = made
    away = Path(store.root) / "away"
    show = Disturbed(lambda left: away.touch(), times=1)
    job = small_run.job_in(Away(store.root), snapshot, encoders, "away", **STEPS, retries=9)
    threading.Timer(25, lambda: away.unlink(missing_ok=True)).start()
    record = ray_train.fit(job, show)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    assert show.told


def test_a_store_that_is_away_when_data_are_read(made: Made, undisturbed: CheckpointRecord, tmp_path: Path):
    store, snapshot, encoders = made
    away = Path(store.root) / "away"
    away.touch()
    show = Disturbed(lambda left: None, times=0)

    def told(message: dict[str, Any]) -> None:
        show(message)
        if message["event"] == "told":
            away.unlink(missing_ok=True)

    reading = {"lanes": 4, "cache": str(tmp_path)}
    job = small_run.job_in(Away(store.root), snapshot, encoders, "away-read", **STEPS, retries=9, reading=reading)
    record = ray_train.fit(job, told)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    assert "the store is away" in show.told[0]


class Away(FileStore):
    def create(self, key: str, data: bytes | Path) -> bool:
        self._check("/state" in key)
        return super().create(key, data)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._check(key.endswith(".tar"))
        return super().get(key, start, end)

    def download(self, key: str, path: Path) -> None:
        self._check(key.endswith(".tar"))
        super().download(key, path)

    def _check(self, concerned: bool) -> None:
        if concerned and (Path(self.root) / "away").exists():
            raise StoreError("the store is away", remedy="wait")


class Outage(FileStore):
    """A folder whose server is away while there is a file `outage` beside it: no call gets through."""

    def _path(self, key: str) -> Path:
        if self.mark.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._path(key)

    @property
    def mark(self) -> Path:
        return self.root.parent / "outage"


def test_a_store_that_is_away_for_far_longer_than_its_calls_are_patient(made: Made, undisturbed: CheckpointRecord):
    """As five minutes are to the usual 75 s, and longer than three attempts would last."""
    store, snapshot, encoders = made
    away = Outage(store.root, patience=2.0)
    back = threading.Timer(100, lambda: away.mark.unlink(missing_ok=True))

    def leave(left: int) -> None:
        away.mark.touch()
        back.start()

    show = Disturbed(leave, times=1)
    record = ray_train.fit(small_run.job_in(away, snapshot, encoders, "outage", **STEPS, retries=2), show)
    back.join()
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    [told] = show.told
    assert "starting again from the last committed state (attempts left: 2)" in told


class FullCache(FileStore):
    """The disk that shards are copied to is full while there is a file `full` in the store."""

    def download(self, key: str, path: Path) -> None:
        def copy() -> None:
            if key.endswith(".tar") and (self.root / "full").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self._do(key, copy)
        super().download(key, path)


def test_a_cache_disk_that_fills_up_ends_a_run_that_goes_on_later(
    made: Made, undisturbed: CheckpointRecord, tmp_path: Path
):
    store, snapshot, encoders = made
    full = store.root / "full"

    def fill(left: int) -> None:
        full.touch()
        for tar in tmp_path.glob("*.tar"):  # so that they must be fetched again
            tar.unlink()

    reading = {"lanes": 4, "cache": str(tmp_path)}
    job = small_run.job_in(FullCache(store.root), snapshot, encoders, "fills-up", **STEPS, reading=reading)
    show = Disturbed(fill, times=1)
    with pytest.raises(SettingsError, match=r"the cache .* cannot be written \(No space left on device\)") as told:
        ray_train.fit(job, show)
    assert "reading.cache_gb lower" in str(told.value)
    assert show.told == []
    full.unlink()
    again = Disturbed(lambda left: None, times=0)
    record = ray_train.fit(job, again)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256
    assert again.steps[0] > 4, "it goes on from a committed state"


def test_a_node_that_is_killed_takes_its_rank_along_and_another_takes_its_place(
    made: Made, undisturbed: CheckpointRecord, tmp_path: Path
):
    (tmp_path / "job").write_bytes(pickle.dumps(small_run.job_in(*made, name="node-killed", **STEPS)))
    command = [sys.executable, "-m", "tests.training.nodes", str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["weights"] == undisturbed.files[WEIGHTS].sha256
    assert said["told"]
    assert all("starting again from the last committed state" in text for text in said["told"])


def test_a_driver_that_is_stopped_has_its_ranks_commit_a_state(made: Made, undisturbed: CheckpointRecord):
    """As SIGTERM does to the command, whose `infra.guard` makes a KeyboardInterrupt of it."""
    job = small_run.job_in(*made, name="stopped-driver", **{**STEPS, "save_every": 20})
    show = Disturbed(lambda left: signal.raise_signal(signal.SIGINT), times=1)
    with pytest.raises(KeyboardInterrupt):
        ray_train.fit(job, show)
    newest = states.newest(job.store, job.prefix)
    assert newest is not None and newest.state is not None
    assert newest.state.step % 4 == 0 and newest.state.step % 20 != 0, "it is not one that was due"
    record = ray_train.fit(job, lambda message: None)
    assert record.files[WEIGHTS].sha256 == undisturbed.files[WEIGHTS].sha256


def test_a_cache_without_room_ends_a_run_at_once(made: Made, ray_cluster: str, tmp_path: Path):
    (tmp_path / "full").write_text("no folder can be made below a file, which is as good as a full disk")
    reading = {"lanes": 4, "cache": str(tmp_path / "full" / "cache")}
    show = Disturbed(lambda left: None, times=0)
    with pytest.raises(SettingsError, match=r"cache"):
        ray_train.fit(small_run.job_in(*made, name="full", **STEPS, reading=reading), show)
    assert show.told == []


def test_faults_of_settings_end_a_run_at_once(made: Made, ray_cluster: str):
    show = Disturbed(lambda left: None, times=0)
    job: Job = small_run.job_in(*made, name="wrong", **{**STEPS, "model": {**small_run.MODEL, "text_dim": 48}})
    with pytest.raises(SettingsError, match="32 wide, the network expects 48"):
        ray_train.fit(replace(job), show)
    assert show.told == []

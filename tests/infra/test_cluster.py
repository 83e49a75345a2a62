"""What a lost mailbox, a busy machine and a full one do to those who use Ray."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray

from infra import cluster
from infra.cluster import Channel, ClusterSettings, connect
from infra.errors import ClusterError


@pytest.mark.usefixtures("ray_cluster")
def test_messages_come_in_order():
    seen: list[dict[str, Any]] = []
    channel = Channel()
    with channel.watched(seen.append, every=0.01):
        for number in range(5):
            channel.send({"number": number})
    assert seen == [{"number": number} for number in range(5)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_dead_mailbox_fails_nobody():
    """Neither him who sends, nor him who watches, nor the end of the work that was watched."""
    channel = Channel()
    with channel.watched(lambda message: None, every=0.01):
        channel.send({"number": 1})
        ray.kill(channel._actor)
        for number in range(3):
            channel.send({"number": number})
    assert channel.receive() == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_mailbox_whose_process_is_killed_comes_back():
    channel = Channel()
    ray.kill(channel._actor, no_restart=False)
    seen: list[dict[str, Any]] = []
    while not seen:  # what is sent while it is away may be lost
        channel.send({"number": 1})
        seen += channel.receive()
    channel.close()
    assert seen[0] == {"number": 1}


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """No Ray in this process; how it was started, in place of starting it."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(cluster, "own_token", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "as it is")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in cluster._ENVIRONMENT | cluster._LOCAL_ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return started


def folders(*parents: Path) -> list[Path]:
    return [path for parent in parents for path in parent.glob("pixnerd-*")]


def test_a_local_ray_has_folders_of_its_own(nobody: list[dict[str, Any]], tmp_path: Path):
    connect()
    session = Path(nobody[0]["_temp_dir"])
    assert session.is_dir() and len(str(session)) < 40
    assert tempfile.gettempdir() != str(tmp_path) and Path(tempfile.gettempdir()).parent == tmp_path
    cluster.disconnect()
    assert not session.exists()
    assert folders(tmp_path) == []
    assert tempfile.gettempdir() == str(tmp_path)


@pytest.mark.parametrize(("address", "watched"), [(None, "0"), ("head:6379", None)])
def test_only_on_a_cluster_that_is_joined_does_training_wait_for_notices(
    nobody: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, address: str | None, watched: str | None
):
    monkeypatch.setattr(cluster, "check_head", lambda address: None)
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    connect(ClusterSettings(address=address))
    assert os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == watched
    cluster.disconnect()


def test_a_ray_that_does_not_start_in_time_is_started_again(
    nobody: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    def slow(**options: Any) -> None:
        nobody.append(options)
        if len(nobody) < 3:
            raise Exception("The current node timed out during startup.")  # Ray's own class

    monkeypatch.setattr(ray, "init", slow)
    connect()
    cluster.disconnect()
    assert len(nobody) == 3


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Exception("The current node timed out during startup."), r"could not be started \(The current node timed out"),
        (RuntimeError("can't start new thread"), "could not be started .no more threads.*ulimit -u"),
        (OSError(errno.ENOSPC, "No space left on device"), "could not be started .the disk is full.*TMPDIR"),
        (ValueError("AF_UNIX path length cannot exceed 107 bytes"), "could not be started .AF_UNIX.*/tmp"),
    ],
    ids=str,
)
def test_a_ray_that_does_not_start_is_an_error_of_ours(
    nobody: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
):
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ClusterError, match=says):
        connect(ClusterSettings())
    assert folders(tmp_path) == []


def test_ray_does_not_keep_the_signals(nobody: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "init", lambda **options: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    before = signal.getsignal(signal.SIGTERM)
    connect()
    cluster.disconnect()
    assert signal.getsignal(signal.SIGTERM) is before

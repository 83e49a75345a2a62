"""What a Ray worker has to tell reaches the terminal of whoever drives it, once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from infra import notices


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notices, "_last", {})
    monkeypatch.setattr(notices, "_EVERY", 0.05)


def test_lines_of_workers_reach_the_driver_once(ray_cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    import ray

    @ray.remote(num_cpus=1)
    def work(number: int, told: Path) -> int:
        notices.tell("the store", "the store is away")
        notices.tell(f"part {number}", f"part {number} is bad")
        while not told.exists():  # a worker that waits for the store lives on
            time.sleep(0.01)
        return number

    with caplog.at_level(logging.WARNING), notices.watched():
        both = [work.remote(number, tmp_path / "told") for number in (1, 2)]
        while len(caplog.records) < 3:  # each told, and none lost
            time.sleep(0.01)
        (tmp_path / "told").touch()
        assert ray.get(both) == [1, 2]
    assert sorted(record.message for record in caplog.records) == [
        "part 1 is bad",
        "part 2 is bad",
        "the store is away",
    ]


def test_without_a_cluster_a_line_is_told_here(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        notices.tell("the store", "the store is away")
        notices.tell("the store", "the store is still away")
    assert [record.message for record in caplog.records] == ["the store is away"]

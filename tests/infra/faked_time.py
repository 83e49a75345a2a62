"""A clock that only sleeping moves on, so that minutes of waiting take none."""

from __future__ import annotations

import threading

import pytest

from infra import notices, outage


class FakedTime:
    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.now += seconds


def faked_time(patch: pytest.MonkeyPatch) -> FakedTime:
    """In place of the clock by which stores wait and lines are told."""
    clock = FakedTime()
    patch.setattr(outage, "time", clock)
    patch.setattr(notices, "time", clock)
    patch.setattr(notices, "_last", {})
    return clock

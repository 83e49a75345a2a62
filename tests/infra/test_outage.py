"""Any outage shorter than the patience is survived by every call, a longer one ends, and both are told of once."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.outage import LONGEST_PAUSE, TOLD_AFTER, ride_out
from tests.infra.faked_time import FakedTime, faked_time

PATIENCE = 60.0
seconds = st.floats(0.0, PATIENCE - 0.001)


class Away(Exception):
    pass


def cause(error: Exception) -> str:
    return "nobody there" if isinstance(error, Away) else ""


@given(outage=seconds, before=seconds, takes=st.sampled_from([0.0, 0.3, 20.0, 70.0]), seed=st.integers(0, 99))
def test_what_lasts_no_longer_than_the_patience_is_survived(outage: float, before: float, takes: float, seed: int):
    with pytest.MonkeyPatch.context() as patch:
        clock = faked_time(patch)
        patch.setattr(random, "uniform", random.Random(seed).uniform)
        began = clock.now - before  # the call comes in the middle of it, or before

        def work() -> float:
            asked = clock.now
            if began <= asked < began + outage:
                clock.now += takes
                raise Away
            return asked

        start = clock.now
        assert ride_out("it", work, cause, PATIENCE, 0.2) <= max(start, began + outage) + takes + LONGEST_PAUSE


def test_patience_ends_after_its_seconds_and_not_before(monkeypatch: pytest.MonkeyPatch):
    clock, asked = faked_time(monkeypatch), []

    def work() -> None:
        asked.append(clock.now)
        raise Away

    with pytest.raises(Away):
        ride_out("it", work, cause, PATIENCE, 0.2)
    assert asked[-1] - asked[0] == pytest.approx(PATIENCE)
    assert max(clock.slept) <= LONGEST_PAUSE
    assert len(asked) < 40


def test_what_does_not_pass_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    clock = faked_time(monkeypatch)
    with pytest.raises(KeyError):
        ride_out("it", lambda: {"b": 1}["a"], cause, PATIENCE, 0.2)
    assert clock.slept == []


def test_an_outage_is_told_once_by_many_calls_and_another_one_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    clock = faked_time(monkeypatch)
    with caplog.at_level(logging.WARNING):
        ride_out("it", lasting(clock, TOLD_AFTER / 2), cause, PATIENCE, 0.2)
        assert caplog.records == []
        for _ in range(3):
            ride_out("it", lasting(clock, 30.0), cause, PATIENCE, 0.2)
        told = [record.message for record in caplog.records]
        assert told == ["it is out of order (nobody there); waiting until it comes back, 60 s at most"]
        clock.now += 3600.0
        ride_out("it", lasting(clock, 30.0), cause, PATIENCE, 0.2)
        assert len(caplog.records) == 2


def lasting(clock: FakedTime, seconds: float) -> Callable[[], None]:
    """Work that fails from now on for so long."""
    until = clock.now + seconds

    def work() -> None:
        if clock.now < until:
            raise Away

    return work

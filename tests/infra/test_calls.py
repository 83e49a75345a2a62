"""Calls to what may be away: nobody waits for them, their order holds, and what is lost is told with its number."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from infra import calls, notices
from infra.calls import Calls, NotTaken


class Server:
    """What is called: it can be away, faulty or unwilling, or let a call hang."""

    def __init__(self) -> None:
        self.took: list[Any] = []
        self.tries = 0
        self.verdict = ""
        self.answers = threading.Event()
        self.answers.set()

    def take(self, what: object) -> object:
        self.tries += 1
        self.answers.wait()
        if self.verdict:
            raise RuntimeError(self.verdict)
        self.took.append(what)
        return what


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(notices, "_last", {})


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.answers.set()


@pytest.fixture
def made() -> Calls:
    return Calls("it", lambda error: (str(error), str(error)))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def until(condition) -> None:
    while not condition():
        threading.Event().wait(0.001)


def test_calls_are_made_in_order(server: Server, made: Calls):
    for number in range(100):
        made.add(partial(server.take, number))
    assert made.wait(60)
    assert server.took == list(range(100))
    assert made.ask(lambda: server.take("answer"), 60) == "answer"


def test_while_it_is_away_nobody_waits_and_afterwards_nothing_is_missing(
    server: Server, made: Calls, caplog: pytest.LogCaptureFixture
):
    server.verdict = "away"
    for number in range(100):
        made.add(partial(server.take, number))
    until(lambda: server.tries > 5)
    assert not made.wait(0.01)
    server.verdict = ""
    assert made.wait(60)
    assert server.took == list(range(100))
    assert told(caplog) == ["it does not answer (away); the work goes on, and what it logs waits"]


def test_what_it_refuses_is_left_out_and_told_once(server: Server, made: Calls, caplog: pytest.LogCaptureFixture):
    server.verdict = "refuses"
    for _ in range(5):
        made.add(lambda: server.take("refused"))
    assert made.wait(60)
    with pytest.raises(NotTaken, match="refuses"):
        made.ask(lambda: server.take("asked"), 60)
    server.verdict = ""
    made.add(lambda: server.take("taken"))
    assert made.wait(60)
    assert (server.tries, server.took) == (7, ["taken"])
    assert told(caplog) == ["it refuses a call (refuses); the work goes on without it"]


def test_a_fault_of_its_own_holds_up_nobody_for_ever(server: Server, made: Calls):
    server.verdict = "faulty"
    made.add(lambda: server.take("faulty"))
    assert made.wait(60)
    assert server.tries == calls.TRIES_OF_A_FAULT


def test_rows_that_wait_go_out_together(server: Server, made: Calls):
    server.answers.clear()
    for number in range(10):
        made.add_row(server.take, number)
    made.add(lambda: server.take("between"))
    for number in range(10, 250):
        made.add_row(server.take, number)
    server.answers.set()
    assert made.wait(60)
    first, *rest = [row for row in server.took if row != "between"]
    assert sum(rest, first) == list(range(250))
    assert server.took.index("between") in (1, 2)  # the very first row may have gone alone
    assert max(map(len, rest)) == calls.MOST_ROWS


def test_an_answer_that_does_not_come_is_not_waited_for(server: Server, made: Calls):
    server.verdict = "away"
    with pytest.raises(NotTaken, match=r"away|no answer within"):
        made.ask(lambda: server.take("asked"), 0.05)
    server.verdict = ""
    made.add(lambda: server.take("next"))
    assert made.wait(60)
    assert server.took == ["next"]  # what nobody waits for any more is not made


def test_the_end_waits_for_what_is_on_its_way(server: Server, made: Calls, caplog: pytest.LogCaptureFixture):
    for number in range(100):
        made.add(partial(server.take, number))
    made.close(60, 0.01)
    assert (len(server.took), told(caplog)) == (100, [])


@pytest.mark.parametrize("hangs", [True, False])
def test_what_is_lost_at_the_end_is_told_with_its_number(
    server: Server, made: Calls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, hangs: bool
):
    monkeypatch.setattr(calls, "STUCK_AFTER", 0.01)
    server.verdict = "" if hangs else "away"
    if hangs:
        server.answers.clear()
    for number in range(7):
        made.add(partial(server.take, number))
        made.add_row(server.take, number)
    until(lambda: server.tries)
    made.close(600, 0.02)
    why = "no answer in time" if hangs else "away"
    lost = f"it did not get 14 of the things logged ({why}); the records in the store hold the results"
    assert told(caplog)[-1] == lost
    made.add(lambda: server.take("later"))
    assert made.wait(0)


def test_no_more_waits_than_memory_bears(
    server: Server, made: Calls, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calls, "MOST", 10)
    server.answers.clear()
    for number in range(100):
        made.add(partial(server.take, number))
    server.answers.set()
    made.close(60, 60)
    assert server.took == [0, *range(91, 100)]
    assert told(caplog)[-1].startswith("it did not get 90 of")

"""Nobody waits in silence: what is being done is said when nothing else was, and what is said is the newest."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestration import cli, patience, terminal
from orchestration.commands import doctor


class Clock:
    """The time that the watches see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (patience, terminal):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(patience, "_CHECK_EVERY", 3600.0)  # the tests look themselves
    return Clock(monkeypatch)


def test_a_line_comes_whenever_nothing_else_was_said_for_a_while(clock: Clock):
    said: list[str] = []
    with patience.Watch(said.append, "loading") as watch:
        for seconds in range(1, 26):
            clock.now = 1000 + seconds
            if seconds == 10:
                patience.doing("starting Ray")
            if seconds == 15:
                watch.spoke()
            watch.check()
    assert said == ["  still loading, 6 s", "  still starting Ray, 2 s", "  still starting Ray, 11 s"]


def test_of_several_watches_the_last_one_speaks(clock: Clock):
    said: list[str] = []
    with patience.Watch(lambda text: said.append(f"command:{text}"), "loading") as command:
        clock.now += 5
        with patience.Watch(lambda text: said.append(f"screen:{text}"), "at low") as screen:
            clock.now += 4
            command.check()
            screen.check()
        command.check()
        clock.now += 9
        command.check()
    assert said == ["screen:  still at low, 4 s", "command:  still loading, 18 s"]


def news(text: str, done: int) -> Any:
    """A stage's progress; the stages themselves are slow to import."""
    return SimpleNamespace(text=text, done=done, total=100, own=0.0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_stage_without_news_is_told_of_and_news_that_came_too_soon_are_not_lost(
    clock: Clock, capsys: pytest.CaptureFixture[str]
):
    node = SimpleNamespace(name="low")
    with terminal.Screen() as screen:
        screen.doing("starting Ray")
        clock.now += 12
        screen._watch.check()
        screen.stage(node, "running", "")  # type: ignore[arg-type]
        clock.now += 9
        screen._watch.check()
        clock.now += 2
        screen.progress("low", news("step 50 of 100", 50))
        clock.now += 1
        screen.progress("low", news("step 60 of 100", 60))
        clock.now += 6
        screen._watch.check()
        clock.now += 8
        screen._watch.check()
    assert lines(capsys) == [
        "  0:12   still starting Ray, 12 s",
        "  0:12 > low          running",
        "  0:21   still at low, 9 s",
        "  0:30   low: step 60 of 100, 0:04 left",
        "  0:38   still at low: step 60 of 100, 14 s",
    ]


def test_a_quiet_screen_is_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with terminal.Screen(quiet=True) as screen:
        screen.doing("starting Ray")
        clock.now += 60
        screen._watch.check()
    assert lines(capsys) == []


def test_on_a_terminal_a_bar_moves_from_the_first_moment_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal.Screen() as screen:
        screen.doing("starting Ray")
        [task] = screen._bars.tasks
        assert (task.visible, task.description, task.total) == (True, "starting Ray", None)
        capsys.readouterr()
        screen._remind("  still starting Ray, 9 s")
        assert "still" not in capsys.readouterr().err


def test_a_command_is_watched_from_its_beginning_to_its_end(monkeypatch: pytest.MonkeyPatch):
    """The watch's thread speaks by itself while the command's work says nothing."""
    spoke = threading.Event()
    said: list[str] = []

    def of_command(make: Callable[[], patience.Watch] = patience.of_command) -> patience.Watch:
        watch = make()
        say = watch._say
        watch._say = lambda text: (say(text), said.append(text), spoke.set())  # type: ignore[assignment,func-returns-value]
        return watch

    def work(store: str | None) -> list[doctor.Finding]:
        patience.doing("looking")
        assert spoke.wait(60)
        return []

    monkeypatch.setattr(patience, "of_command", of_command)
    monkeypatch.setattr(patience, "SILENCE", 0.05)
    monkeypatch.setattr(patience, "_CHECK_EVERY", 0.01)
    monkeypatch.setattr(doctor, "examine", work)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.stderr
    assert re.match(r"  0:\d\d   still (loading|looking), \d+ s\n", result.stderr)
    assert not patience._watches

"""No command is silent for long: after some seconds without output, a line tells what is being done and for how long.

Every command has a `Watch`. Whatever shows progress itself, such as `terminal.Screen`, has a watch of its own, and only
the innermost one prints. Code tells what it is about to do with `doing("reading every shard")`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

SILENCE = 6.0  # seconds: after ten, users think that a command hangs, and a busy machine adds some
_CHECK_EVERY = 0.5


class Watch:
    """Prints what is being done whenever nothing was printed for a while, from a thread that ends with the watch."""

    def __init__(self, say: Callable[[str], None], what: str = "") -> None:
        self._say = say
        self._what, self._since = what, time.monotonic()
        self._spoke = self._since
        self._ended = threading.Event()

    def doing(self, what: str) -> None:
        if what != self._what:
            self._what, self._since = what, time.monotonic()

    def spoke(self) -> None:
        """Note that a line was printed."""
        self._spoke = time.monotonic()

    def check(self) -> None:
        now = time.monotonic()
        if self._what and now - self._spoke >= SILENCE and _watches[-1:] == [self]:
            self._spoke = now
            self._say(f"  still {self._what}, {now - self._since:.0f} s")

    def __enter__(self) -> Watch:
        for outer in _watches[-1:]:
            self._spoke = outer._spoke  # users count silence from the last line, whichever watch printed it
        _watches.append(self)
        threading.Thread(target=self._wait, name="patience", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        _watches.remove(self)
        for outer in _watches[-1:]:
            outer.spoke()

    def _wait(self) -> None:
        while not self._ended.wait(_CHECK_EVERY):
            self.check()


_watches: list[Watch] = []  # those that are active, the outermost first; only the last one prints


def of_command() -> Watch:
    """The watch of a whole command."""
    began = time.monotonic()

    def say(text: str) -> None:
        seconds = int(time.monotonic() - began)
        print(f"{seconds // 60:3d}:{seconds % 60:02d} {text}", file=sys.stderr, flush=True)

    return Watch(say, "loading")


def doing(what: str) -> None:
    """Tell the innermost watch what is about to be done."""
    for watch in _watches[-1:]:
        watch.doing(what)

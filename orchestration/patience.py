"""Nobody waits in silence: when nothing was said for some seconds, a line tells what is being done, and for how long.

Every command has a watch; where something writes its progress, that has one of its own, and the command's is held back
for so long. What is being done is told by whoever does it, before it begins: `doing("reading every shard")`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

SILENCE = 6.0  # seconds without a line: after ten of them one thinks that it hangs, and busy machines add some
_LOOK_EVERY = 0.5


class Watch:
    """Says what goes on whenever nothing else has for a while; in a thread, which ends with the watch."""

    def __init__(self, say: Callable[[str], None], what: str = "") -> None:
        self._say = say
        self._what, self._since = what, time.monotonic()
        self._spoke = self._since
        self._ended = threading.Event()

    def doing(self, what: str) -> None:
        if what != self._what:
            self._what, self._since = what, time.monotonic()

    def spoke(self) -> None:
        """Somebody wrote a line."""
        self._spoke = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if self._what and now - self._spoke >= SILENCE and _watches[-1:] == [self]:
            self._spoke = now
            self._say(f"  still {self._what}, {now - self._since:.0f} s")

    def __enter__(self) -> Watch:
        for below in _watches[-1:]:
            self._spoke = below._spoke  # who waits does not care which watch it is that has said nothing
        _watches.append(self)
        threading.Thread(target=self._wait, name="patience", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        _watches.remove(self)
        for below in _watches[-1:]:
            below.spoke()

    def _wait(self) -> None:
        while not self._ended.wait(_LOOK_EVERY):
            self.look()


_watches: list[Watch] = []  # the last one speaks


def of_command() -> Watch:
    """A command's own watch, from its beginning to its end."""
    began = time.monotonic()

    def say(text: str) -> None:
        seconds = int(time.monotonic() - began)
        print(f"{seconds // 60:3d}:{seconds % 60:02d} {text}", file=sys.stderr, flush=True)

    return Watch(say, "loading")


def doing(what: str) -> None:
    for watch in _watches[-1:]:
        watch.doing(what)

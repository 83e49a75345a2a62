"""Calls to a server that may be away, made in their order by a thread of their own: who asks for one never waits.

A call that meets no server is made again until it comes back; one that is refused is left out and told of. The thread
does not hold up the end of the process: `close` gives it some last seconds, and tells what was not made.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass, field
from typing import Any, TypeVar

from infra.notices import tell

T = TypeVar("T")

MOST = 10_000  # calls that wait; with one every few seconds, some hours of them
MOST_ROWS = 100  # of one call
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
STUCK_AFTER = 5.0  # seconds without an answer, after which nobody waits for one at the end
TRIES_OF_A_FAULT = 5  # a server that answers, but with a fault of its own, is asked so often


class NotTaken(Exception):
    """Why a call was not made, or what the server said to it."""


class Calls:
    """`judge` tells of an error what it says, and whether it means that the server is `away`, `faulty` or `refuses`."""

    def __init__(self, name: str, judge: Callable[[Exception], tuple[str, str]]) -> None:
        self.name, self._judge = name, judge
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()  # the first one is being made
        self._since: float | None = None  # when that began
        self._away = ""  # why, while nobody answers
        self._refusals: set[str] = set()
        self._left_out = 0
        self._over = False
        self._thread: threading.Thread | None = None

    def add(self, work: Callable[[], object]) -> None:
        """Never waits and never fails."""
        self._append(_Call(work))

    def add_row(self, send: Callable[[list[Any]], object], row: Any) -> None:
        """The same for what can be sent together: rows of one `send` that wait one behind the other go in one call."""
        self._append(_Call(send, [row]))

    def ask(self, work: Callable[[], T], seconds: float) -> T:
        """What the call gives, which all calls before it come before; NotTaken if it is refused, or too late."""
        answer: Future[T] = Future()
        call = _Call(work, answer=answer)
        self._append(call)
        try:
            return answer.result(seconds)
        except TooLate:
            with self._changed:
                if call in self._waiting:
                    self._waiting.remove(call)
                raise NotTaken(self._away or f"no answer within {seconds:.0f} s") from None

    def wait(self, seconds: float) -> bool:
        """Whether all calls have been made, at the latest after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def close(self, seconds: float, away: float) -> None:
        """The end of all calls: those that wait still have some seconds, and fewer if nobody answers."""
        began = time.monotonic()
        with self._changed:
            while self._waiting and (left := began + (away if self._stuck() else seconds) - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.2))
            lost, self._over = sum(call.size for call in self._waiting) + self._left_out, True
            why = self._away or "no answer in time"
            self._waiting.clear()
            self._changed.notify_all()
        if lost:
            told = f"{self.name} did not get {lost:,} of the things logged ({why})"
            tell(f"{self.name}: lost", f"{told}; the records in the store hold the results")

    def _append(self, call: _Call) -> None:
        with self._changed:
            if self._over:
                return
            if len(self._waiting) >= MOST:
                self._left_out += self._waiting[1].size
                del self._waiting[1]
            self._waiting.append(call)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._make_all, name="calls", daemon=True)
                self._thread.start()

    def _stuck(self) -> bool:
        return bool(self._away) or (self._since is not None and time.monotonic() - self._since > STUCK_AFTER)

    def _make_all(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if self._over:
                    return
                call, self._since = self._next(), time.monotonic()
            done = self._made(call)
            with self._changed:
                self._since = None
                if done and self._waiting and self._waiting[0] is call:
                    self._waiting.popleft()
                self._changed.notify_all()
                if done:
                    pause = FIRST_PAUSE
                    continue
                self._changed.wait_for(lambda: self._over, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _next(self) -> _Call:
        call = self._waiting[0]
        while len(self._waiting) > 1 and call.takes(self._waiting[1]):
            call.rows += self._waiting[1].rows
            del self._waiting[1]
        return call

    def _made(self, call: _Call) -> bool:
        """Whether that was all about the call; if not, it is to be made again."""
        call.tries += 1
        try:
            call.make()
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait for other calls must get them
            said, verdict = self._judge(error)
            if verdict == "away" or (verdict == "faulty" and call.tries < TRIES_OF_A_FAULT):
                self._away = said
                tell(self.name, f"{self.name} does not answer ({said}); the work goes on, and what it logs waits")
                return False
            self._refused(call, said)
        self._away = ""
        return True

    def _refused(self, call: _Call, said: str) -> None:
        if call.answer is not None:
            call.answer.set_exception(NotTaken(said))
        elif said not in self._refusals:
            self._refusals.add(said)
            tell(f"{self.name}: {said}", f"{self.name} refuses a call ({said}); the work goes on without it")


@dataclass(eq=False)
class _Call:
    work: Callable[..., Any]
    rows: list[Any] = field(default_factory=list)
    answer: Future[Any] | None = None
    tries: int = 0

    @property
    def size(self) -> int:
        return len(self.rows) or 1

    def takes(self, other: _Call) -> bool:
        return bool(self.rows and other.rows) and self.work == other.work and self.size < MOST_ROWS

    def make(self) -> None:
        given = self.work(self.rows) if self.rows else self.work()
        if self.answer is not None:
            self.answer.set_result(given)

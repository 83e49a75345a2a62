"""A queue of calls to a server that may be away. A thread makes them in their order, so callers do not wait.

A call that does not reach the server is repeated until the server is back. A call that the server refuses is dropped,
and the user is told. The thread does not delay the end of the process: `close` gives it a few seconds, and tells the
user how many calls were not made.
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

MOST = 10_000  # calls in the queue: with one every few seconds, those of some hours
MOST_ROWS = 100  # rows in one call
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
STUCK_AFTER = 5.0  # seconds without an answer, after which `close` takes the server for away
TRIES_OF_A_FAULT = 5  # attempts at a call to which the server answers with an internal error


class NotTaken(Exception):
    """A call was not made, or was refused; the text tells why."""


class Calls:
    """`judge`: an error -> its text, and "away", "faulty" or "refuses", which says what the server did."""

    def __init__(self, name: str, judge: Callable[[Exception], tuple[str, str]]) -> None:
        self.name, self._judge = name, judge
        self._changed = threading.Condition()
        self._queue: deque[_Call] = deque()  # the first call is being made
        self._call_began: float | None = None
        self._outage = ""  # why the server is away, while it is
        self._refusals: set[str] = set()  # that the user was told of
        self._dropped = 0  # calls and rows that found the queue full
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, work: Callable[[], object]) -> None:
        """Queue a call. Never waits and never fails."""
        self._append(_Call(work))

    def add_row(self, send: Callable[[list[Any]], object], row: Any) -> None:
        """Queue a row; successive rows of the same `send` in the queue go in one call."""
        self._append(_Call(send, [row]))

    def ask(self, work: Callable[[], T], seconds: float) -> T:
        """The result of a call, which is made after those in the queue; NotTaken if it is refused or takes too long."""
        answer: Future[T] = Future()
        call = _Call(work, answer=answer)
        self._append(call)
        try:
            return answer.result(seconds)
        except TooLate:
            with self._changed:
                if call in self._queue:
                    self._queue.remove(call)
                raise NotTaken(self._outage or f"no answer within {seconds:.0f} s") from None

    def wait(self, seconds: float) -> bool:
        """Wait until all calls have been made, for at most so many seconds; whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, seconds)

    def close(self, seconds: float, away: float) -> None:
        """Make the rest of the calls within `seconds`, or `away` seconds if the server is away, and drop the others."""
        began = time.monotonic()
        with self._changed:
            while self._queue and (left := began + (away if self._stuck() else seconds) - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.2))
            lost, self._closed = sum(call.size for call in self._queue) + self._dropped, True
            why = self._outage or "no answer in time"
            self._queue.clear()
            self._changed.notify_all()
        if lost:
            loss = f"{self.name} did not get {lost:,} of the things logged ({why})"
            tell(f"{self.name}: lost", f"{loss}; the records in the store hold the results")

    def _append(self, call: _Call) -> None:
        with self._changed:
            if self._closed:
                return
            if len(self._queue) >= MOST:
                self._dropped += self._queue[1].size
                del self._queue[1]
            self._queue.append(call)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._make_all, name="calls", daemon=True)
                self._thread.start()

    def _stuck(self) -> bool:
        slow = self._call_began is not None and time.monotonic() - self._call_began > STUCK_AFTER
        return bool(self._outage) or slow

    def _make_all(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                call, self._call_began = self._next(), time.monotonic()
            done = self._try(call)
            with self._changed:
                self._call_began = None
                if done and self._queue and self._queue[0] is call:
                    self._queue.popleft()
                self._changed.notify_all()
                if done:
                    pause = FIRST_PAUSE
                    continue
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _next(self) -> _Call:
        call = self._queue[0]
        while len(self._queue) > 1 and call.takes(self._queue[1]):
            call.rows += self._queue[1].rows
            del self._queue[1]
        return call

    def _try(self, call: _Call) -> bool:
        """Make the call; False if it must be repeated."""
        call.tries += 1
        try:
            call.make()
        except Exception as error:  # noqa: BLE001 - no error may stop the calls that follow
            text, verdict = self._judge(error)
            if verdict == "away" or (verdict == "faulty" and call.tries < TRIES_OF_A_FAULT):
                self._outage = text
                tell(self.name, f"{self.name} does not answer ({text}); the work goes on, and what it logs waits")
                return False
            self._refuse(call, text)
        self._outage = ""
        return True

    def _refuse(self, call: _Call, text: str) -> None:
        if call.answer is not None:
            call.answer.set_exception(NotTaken(text))
        elif text not in self._refusals:
            self._refusals.add(text)
            tell(f"{self.name}: {text}", f"{self.name} refuses a call ({text}); the work goes on without it")


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
        result = self.work(self.rows) if self.rows else self.work()
        if self.answer is not None:
            self.answer.set_result(result)

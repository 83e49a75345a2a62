"""Ends a rank that has taken no step for long, and says where it stands: a run that hangs costs money in silence.

Where one rank is stuck, all of them are, each in the exchange that it waits for. So every rank has a watchdog, all
speak at about the same time, and the driver shows their lines side by side: the odd one is the cause, and one that is
stopped altogether says nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

HUNG = 70  # the exit code of a rank that its watchdog ended
_DELIVERY_SECONDS = 3.0
_HERE = str(Path(__file__).resolve().parent.parent)


class Watchdog:
    """`beat` must be called every `seconds`, by the thread that made it."""

    def __init__(
        self, seconds: float, rank: int, bark: Callable[[str], None], end: Callable[[int], None] = os._exit
    ) -> None:
        self._seconds, self._rank, self._bark, self._end = seconds, rank, bark, end
        self._watched = threading.get_ident()
        self._last, self._over = time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._bark(
                    f"rank {self._rank} on {socket.gethostname()} has taken no step for {self._seconds:g} s:"
                    f" it is at {standing(self._watched)}"
                )
                self._over.wait(_DELIVERY_SECONDS)
                self._end(HUNG)
                return


def standing(thread: int) -> str:
    """Where a thread is, and which line of ours led there: `recv in socket.py:705, from image in reader.py:51`."""
    frame: FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return "its end"
    inner, ours = _place(frame), None
    while frame is not None and ours is None:
        ours = _place(frame) if frame.f_code.co_filename.startswith(_HERE) else None
        frame = frame.f_back
    return inner if ours in (None, inner) else f"{inner}, from {ours}"


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"

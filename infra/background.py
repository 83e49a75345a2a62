"""Work that is repeated in a thread, beside whatever else the process does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(
    work: Callable[[], None], seconds: float, name: str, *, at_once: bool = False, longest_end: float | None = None
) -> Iterator[None]:
    """While the body runs, a thread calls `work` every so many seconds; the first time after a pause, or `at_once`.

    After the body a call that is under way is waited for, but no longer than `longest_end` seconds.
    """
    over = threading.Event()

    def loop() -> None:
        pause = 0.0 if at_once else seconds
        while not over.wait(pause):
            work()
            pause = seconds

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(longest_end)

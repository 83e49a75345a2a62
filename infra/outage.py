"""Waiting for what comes back by itself: bounded by time, never by a number of tries."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from infra.notices import tell

T = TypeVar("T")
log = logging.getLogger(__name__)

LONGEST_PAUSE = 5.0
TOLD_AFTER = 2.0  # seconds that a call has taken; what passes sooner concerns nobody


def ride_out(name: str, work: Callable[[], T], cause: Callable[[Exception], str], patience: float, backoff: float) -> T:
    """Repeat the work as long as it fails for a cause that passes, for `patience` seconds from the first failure.

    `cause` names what passes by itself, and says nothing of any other error. The last attempt begins when those seconds
    are over, so whatever outage is shorter is survived for certain, by every single call.
    """
    began, pause = time.monotonic(), backoff
    deadline = None
    while True:
        asked = time.monotonic()
        try:
            return work()
        except Exception as error:
            why, now = cause(error), time.monotonic()
            deadline = now + patience if deadline is None else deadline
            if not why or asked >= deadline:
                raise
        if now - began >= TOLD_AFTER:
            tell(name, f"{name} is out of order ({why}); waiting until it comes back, {patience:.0f} s at most")
        nap = min(pause * random.uniform(0.5, 1.0), max(0.0, deadline - now))  # so that not all come back at once
        log.info("%s: %s; trying again in %.1f s", name, why, nap)
        time.sleep(nap)
        pause = min(2 * pause, LONGEST_PAUSE)

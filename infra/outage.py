"""Retrying calls to a service that is away for a while; limited by time, not by a number of attempts."""

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
TOLD_AFTER = 2.0  # seconds; the user is not told of shorter outages


def ride_out(name: str, work: Callable[[], T], cause: Callable[[Exception], str], patience: float, backoff: float) -> T:
    """Repeat the work while it fails for a temporary cause, for `patience` seconds from the first failure.

    `cause` describes an error that is temporary; for any other error it returns "". The last attempt begins after these
    seconds, so every single call survives any outage that is shorter.
    """
    began, pause = time.monotonic(), backoff
    deadline = None
    while True:
        attempt_began = time.monotonic()
        try:
            return work()
        except Exception as error:
            why, now = cause(error), time.monotonic()
            deadline = now + patience if deadline is None else deadline
            if not why or attempt_began >= deadline:
                raise
        if now - began >= TOLD_AFTER:
            tell(name, f"{name} is out of order ({why}); waiting until it comes back, {patience:.0f} s at most")
        # Random, so that not all callers return at once.
        wait = min(pause * random.uniform(0.5, 1.0), max(0.0, deadline - now))
        log.info("%s: %s; trying again in %.1f s", name, why, wait)
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)

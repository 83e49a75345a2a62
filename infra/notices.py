"""Lines that a user must see, wherever they are told: in this process, or in a Ray worker, perhaps on another machine.

What a worker writes to its standard error ends in Ray's log files, which nobody reads. So a worker leaves the line with
an actor as well, which it starts only then, and whoever drives the work looks now and then whether there is one.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

_ACTOR = "pixnerd-notices"
_EVERY = 1.0
_SAME = 120.0  # seconds in which nothing more is told of one thing
_LATEST = 10.0  # seconds that an answer may take
_lock = threading.Lock()
_last: dict[str, float] = {}  # when each thing was last told of, or told of again in vain
_boxes: list[Any] = []  # an actor lives as long as the one who started it holds it


def tell(about: str, text: str) -> None:
    """One line, unless there has been one about this within the last minutes: many calls meet one outage."""
    if not _first(about):
        return
    log.warning(text)
    if _in_a_worker():
        threading.Thread(target=_pass_on, args=(about, text), name="notices", daemon=True).start()


@contextmanager
def watched() -> Iterator[None]:
    """This process drives a cluster's work: while the body runs, it tells what the workers have to tell."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(over,), name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_EVERY)


def _first(about: str) -> bool:
    with _lock:
        now = time.monotonic()
        before, _last[about] = _last.get(about, -math.inf), now
    return now - before > _SAME


def _in_a_worker() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def _pass_on(about: str, text: str) -> None:
    import ray
    from ray.exceptions import RayError

    for _ in range(3):  # the actor ends with the worker that started it, whoever else uses it
        try:
            box = ray.remote(num_cpus=0)(_Box).options(name=_ACTOR, get_if_exists=True).remote()
            _boxes.append(box)
            ray.get(box.put.remote(about, text), timeout=_LATEST)
            return
        except (RayError, ValueError) as error:
            log.info("the driver was not told (%s)", error)


def _watch(over: threading.Event) -> None:
    import ray
    from ray.exceptions import RayError

    while not over.wait(_EVERY):
        try:
            lines = ray.get(ray.get_actor(_ACTOR).take.remote(), timeout=_LATEST)
        except (RayError, ValueError):  # no worker has anything to tell
            continue
        for about, text in lines:
            tell(about, text)


class _Box:
    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def put(self, about: str, text: str) -> None:
        self._lines.append((about, text))

    def take(self) -> list[tuple[str, str]]:
        lines, self._lines = self._lines, []
        return lines

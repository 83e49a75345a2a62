"""Lines that the user must see, whether they come from this process or from a Ray worker, perhaps on another machine.

What a worker writes to its standard error ends up in Ray's log files, which nobody reads. So a worker also leaves the
line with an actor, which it starts when it needs it, and the driver asks now and then whether that actor exists.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from infra.background import repeated

log = logging.getLogger(__name__)

_ACTOR = "pixnerd-notices"
_EVERY = 1.0  # seconds between the driver's questions
_SAME = 120.0  # seconds without a notice about a thing, after which it is told of again
_LATEST = 10.0  # seconds that an answer may take
_lock = threading.Lock()
_last: dict[str, float] = {}  # when `tell` was last called about each thing, whether or not it printed a line
_mailboxes: list[Any] = []  # references, which keep the actors alive


def tell(about: str, text: str) -> None:
    """Show a line, unless there has been one about this in the last minutes: an outage affects many calls."""
    if not _first(about):
        return
    log.warning(text)
    if _in_a_worker():
        threading.Thread(target=_pass_on, args=(about, text), name="notices", daemon=True).start()


@contextmanager
def watched() -> Iterator[None]:
    """While the body runs, this process, the driver, shows the lines of its workers."""
    with repeated(_show_workers_lines, _EVERY, "notices", longest_end=_EVERY):
        yield


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

    for _ in range(3):  # the actor may end meanwhile, with the worker that started it
        try:
            mailbox = ray.remote(num_cpus=0)(Mailbox).options(name=_ACTOR, get_if_exists=True).remote()
            _mailboxes.append(mailbox)
            ray.get(mailbox.put.remote((about, text)), timeout=_LATEST)
            return
        except (RayError, ValueError) as error:
            log.info("the driver was not told (%s)", error)


def _show_workers_lines() -> None:
    import ray
    from ray.exceptions import RayError

    with suppress(RayError, ValueError):  # ValueError: there is no actor, since no worker has left a line
        for about, text in ray.get(ray.get_actor(_ACTOR).take.remote(), timeout=_LATEST):
            tell(about, text)


class Mailbox:
    """An actor with messages from workers to the driver, and its wish that they end."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._end = False

    def put(self, message: Any) -> None:
        self._messages.append(message)

    def take(self) -> list[Any]:
        messages, self._messages = self._messages, []
        return messages

    def ask_to_end(self) -> None:
        self._end = True

    def asked_to_end(self) -> bool:
        return self._end

"""Which runs are at work on a store, so that one is told of the others.

    running/<run>.json        who and since when; there as long as the run is
    running/<run>.json.beat   another text every few seconds

Nothing depends on these notes: what several runs do at once is right without them. The note of a run that was killed is
dropped by the next one: on the same machine as soon as its process is gone, elsewhere once its beat has stood still for
long, by the clock of the one who looks. The time in a note is only told.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from infra import layout
from infra.claim import BEAT_SECONDS, PATIENCE_SECONDS, process_of, runs_here
from infra.errors import NotFound, PixnerdError, RecordError
from infra.records import Record, read_record, write_record
from infra.store import Store

Tell = Callable[[str], None]


class RunRecord(Record):
    workflow: str
    host: str
    pid: int
    process: str  # told from every other process that its machine ever ran
    since: str


@contextmanager
def noted(store: Store, workflow: str, tell: Tell) -> Iterator[None]:
    """A note of this run while it lasts; `tell` gets a line about each other one, once."""
    record = RunRecord(
        workflow=workflow,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_of(os.getpid()),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    key = layout.RUNNING.at(run=uuid.uuid4().hex[:12])
    over = threading.Event()
    others = Others(store, tell, own=key)
    with suppress(PixnerdError):
        write_record(store, key, record)
        others.look()
    beat = threading.Thread(target=_beat, args=(store, key, others, over), name="running", daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        with suppress(PixnerdError):
            _drop(store, key)


def _beat(store: Store, key: str, others: Others, over: threading.Event) -> None:
    count = 0
    while not over.wait(BEAT_SECONDS if count else 0):
        count += 1
        with suppress(PixnerdError):  # a store that is away: whoever needs it says so
            store.put(f"{key}{layout.BEAT}", str(count).encode())
            others.look()


class Others:
    """The runs that are at work beside this one, as far as they can be told from dead ones."""

    def __init__(self, store: Store, tell: Tell, own: str = "") -> None:
        self.store, self.tell, self.own = store, tell, own
        self._told: set[str] = set()
        self._beats: dict[str, tuple[bytes, float]] = {}  # key -> the beat, and since when it stands still

    def look(self) -> None:
        for key in list(layout.RUNNING.keys(self.store)):
            if key == self.own or key in self._told:
                continue
            with suppress(NotFound, RecordError):  # it has just ended, or says nothing that can be read
                self._look_at(key, read_record(self.store, key, RunRecord))

    def _look_at(self, key: str, run: RunRecord) -> None:
        alive = runs_here(run.process)
        if alive is None:
            alive = self._beats_on(key)
        if alive is False and self.own:
            _drop(self.store, key)
        if alive:
            self._told.add(key)
            self.tell(
                f"another run of `{run.workflow}` is at work on this store (host {run.host}, process {run.pid}, since "
                f"{run.since}); what it finishes first is used here"
            )

    def _beats_on(self, key: str) -> bool | None:
        """None as long as it cannot be told."""
        beat = b""
        with suppress(NotFound):
            beat = self.store.get(f"{key}{layout.BEAT}")
        before, since = self._beats.setdefault(key, (beat, time.monotonic()))
        if beat != before:
            return True
        return False if time.monotonic() - since > PATIENCE_SECONDS else None


def _drop(store: Store, key: str) -> None:
    store.delete(key)
    store.delete(f"{key}{layout.BEAT}")

"""Notes of the runs that are at work on a store, so that each run can tell its user of the others.

    running/<run>.json        who is at work and since when; deleted when the run ends
    running/<run>.json.beat   the heartbeat: its text changes every few seconds

The notes are information only: several runs at once on a store are correct without them. The next run deletes the note
of one that was killed: on the same machine as soon as the process is gone, on others once the heartbeat has not changed
for long. That is measured by the reader's own clock; the time in a note is only shown.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from infra import layout
from infra.claim import BEAT_SECONDS, PATIENCE_SECONDS, beating, drop, last_beat, process_of, runs_here
from infra.errors import NotFound, PixnerdError, RecordError
from infra.records import Record, read_record, write_record
from infra.store import Store

Tell = Callable[[str], None]


class RunRecord(Record):
    workflow: str
    host: str
    pid: int
    process: str  # identifies the process for good: see `infra.claim.process_of`
    since: str


@contextmanager
def noted(store: Store, workflow: str, tell: Tell, run: str = "") -> Iterator[None]:
    """Keep a note of this run while the body runs; `tell` is called once for each other run, with a line about it.

    `run`: its name, if there is a record of it (see history.py).
    """
    record = RunRecord(
        workflow=workflow,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_of(os.getpid()),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    key = layout.RUNNING.at(run=run or uuid.uuid4().hex[:12])
    others = Others(store, tell, own=key)
    with suppress(PixnerdError):
        write_record(store, key, record)
        others.check()
    try:
        with beating(store, key, BEAT_SECONDS, also=others.check):
            yield
    finally:
        with suppress(PixnerdError):
            drop(store, key)


class Others:
    """The other runs on a store: `check` tells of each that is alive, and deletes the notes of dead ones.

    `own` is the key of this run's note; without one (`--dry-run`) nothing is deleted.
    """

    def __init__(self, store: Store, tell: Tell, own: str = "") -> None:
        self.store, self.tell, self.own = store, tell, own
        self._told: set[str] = set()
        self._beats: dict[str, tuple[bytes, float]] = {}  # key -> its heartbeat's text, and since when it is that

    def check(self) -> None:
        for key in list(layout.RUNNING.keys(self.store)):
            if key == self.own or key in self._told:
                continue
            with suppress(NotFound, RecordError):  # the run has just ended, or its note cannot be read
                self._check(key, read_record(self.store, key, RunRecord))

    def _check(self, key: str, run: RunRecord) -> None:
        alive = runs_here(run.process)
        if alive is None:
            alive = self._beats_on(key)
        if alive is False and self.own:
            drop(self.store, key)
        if alive:
            self._told.add(key)
            self.tell(
                f"another run of `{run.workflow}` is at work on this store (host {run.host}, process {run.pid}, since "
                f"{run.since}); what it finishes first is used here"
            )

    def _beats_on(self, key: str) -> bool | None:
        """Whether the heartbeat changes; None while it has not been watched for long enough to tell."""
        beat = last_beat(self.store, key)
        before, since = self._beats.setdefault(key, (beat, time.monotonic()))
        if beat != before:
            return True
        return False if time.monotonic() - since > PATIENCE_SECONDS else None

"""Leases: of several drivers at work on one store, one does a stage's work, and one commits it.

    attempts/<kind>/<digest>/<n>/held.json        attempt n is of the driver that has created this
    attempts/<kind>/<digest>/<n>/held.json.beat   its heartbeat: the text changes every few seconds
    attempts/<kind>/<digest>/<n>/end.json         why it has ended; created by the driver to commit, to give up, or by
                                                  another one that takes the work over
    attempts/<kind>/<digest>/<n>/recorded         the committed work's record has been written

Both committing and taking over create `end.json`, and a key can be created once. So exactly one of them happens: a
driver that slept, and whose work was taken over, cannot commit. Attempt n+1 begins only after the end of attempt n.

The end of committed work holds the stage's record, so whoever finds a commit without its record writes that: its driver
was killed between the two. A record that is missing beside `recorded` was deleted on purpose: the work is done anew.

Whether a driver is alive is judged by how long its heartbeat has been seen unchanged, by the clock of the one that
looks, so clocks need not agree. A process of the same machine that is gone is noticed at once. A wrong judgement costs
work that is done twice, never a second commit.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from infra import layout
from infra.claim import BEAT_SECONDS, PATIENCE_SECONDS, beating, last_beat, process_of, runs_here
from infra.errors import NotFound, PixnerdError, TakenOver
from infra.records import Plain, Record, StageRecord, read_record, recorded, write_record
from infra.store import Store

How = Literal["committed", "partial", "failed", "stopped", "taken over"]


class Who(Plain):
    """The driver that a record tells of."""

    user: str
    host: str
    pid: int
    process: str  # identifies the process for good: see `infra.claim.process_of`
    since: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host} (process {self.pid}, since {self.since})"


class Attempt(Who, Record):
    stage: str  # its name in the workflow
    kind: str
    digest_of_work: str
    number: int
    run: str  # of the workflow; empty if the run is not recorded
    log: str  # key


class AttemptEnd(Record):
    how: How
    why: str = ""
    by: str  # who has written this: the attempt's own driver, or the one that took its work over
    at: str
    record: StageRecord | None = None  # the stage's, if the work was committed


def this_driver() -> dict[str, str | int]:
    """The fields of `Who`, for this process and this moment."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        user = str(os.getuid())
    pid = os.getpid()
    return {"user": user, "host": socket.gethostname(), "pid": pid, "process": process_of(pid), "since": now()}


def now() -> str:
    """This machine's time, as records show it. Nothing is decided by it."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


class Tried(NamedTuple):
    """What the store holds of one attempt."""

    attempt: Attempt
    end: AttemptEnd | None
    recorded: bool
    heard: float  # when its heartbeat last changed, by the store's clock

    def failed(self) -> bool:
        return self.end is not None and self.end.how == "failed"


def tried(store: Store, kind: str, digest: str) -> list[Tried]:
    """All attempts at some work, the first one first."""
    there = {entry.key: entry for entry in store.list(layout.ATTEMPTS.at(kind=kind, digest=digest))}
    found = []
    for key in there:
        if (parts := layout.HELD.parse(key)) is None:
            continue
        end, beat = layout.ENDED.at(**parts), there.get(f"{key}{layout.BEAT}", there[key])
        found.append(
            Tried(
                read_record(store, key, Attempt),
                read_record(store, end, AttemptEnd) if end in there else None,
                layout.RECORDED.at(**parts) in there,
                beat.modified,
            )
        )
    return sorted(found, key=lambda one: one.attempt.number)


class Lease:
    """An attempt of this driver, from its beginning to its end."""

    def __init__(self, store: Store, attempt: Attempt, beats: Beats) -> None:
        self.store, self.attempt, self._beats = store, attempt, beats
        self.lost = False  # known to be taken over

    @property
    def key(self) -> str:
        return layout.HELD.at(**_parts(self.attempt))

    def beating(self, also: Callable[[], object] = lambda: None) -> AbstractContextManager[None]:
        """While the body runs the heartbeat goes on, and `also` is called after each beat."""
        return self._beats(self.store, self.key, also)

    def check(self) -> None:
        """Raise TakenOver if the work is another driver's by now; to be called just before what cannot be undone."""
        if self.store.exists(layout.ENDED.at(**_parts(self.attempt))):
            self.lost = True
            raise self._taken_over()

    def commit(self, record: StageRecord) -> StageRecord:
        """End the attempt with its work done. Returns the stage's record as it is in the store."""
        if not self._ended("committed", record=record):
            # Only this driver commits this attempt: if it is committed, an answer of the store's was lost.
            end = read_record(self.store, layout.ENDED.at(**_parts(self.attempt)), AttemptEnd)
            if end.record is None:
                self.lost = True
                raise self._taken_over()
            record = end.record
        return _settled(self.store, self.attempt.number, record)

    def give_up(self, how: How, why: str) -> bool:
        """End the attempt with its work not done; whether this driver held it until then, as far as it can tell."""
        with suppress(PixnerdError):  # the store is away; others will notice that the heartbeat does not change
            self.lost = not self._ended(how, why)
            return not self.lost
        return False

    def _ended(self, how: How, why: str = "", record: StageRecord | None = None) -> bool:
        end = AttemptEnd(how=how, why=why, by=str(self.attempt), at=now(), record=record)
        return write_record(self.store, layout.ENDED.at(**_parts(self.attempt)), end)

    def _taken_over(self) -> TakenOver:
        return TakenOver(
            f"another driver has taken `{self.attempt.stage}` over, as nothing was heard of this one for long",
            remedy="let the other one finish, or stop it and run again",
        )


Beats = Callable[[Store, str, Callable[[], object]], AbstractContextManager[None]]


def _in_a_thread(store: Store, key: str, also: Callable[[], object]) -> AbstractContextManager[None]:
    return beating(store, key, BEAT_SECONDS, also)


class _Heard(NamedTuple):
    beat: bytes
    since: float  # by the watching driver's clock
    changed: bool  # whether another one was seen before


class Driver:
    """A driver, which takes leases and watches those of others.

    `run` is the workflow run that its attempts belong to. Tests bring their own clock, pauses and heartbeats.
    """

    def __init__(
        self,
        store: Store,
        run: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        beats: Beats = _in_a_thread,
    ) -> None:
        self.store, self.run, self.pause = store, run, pause
        self._clock, self._beats = clock, beats
        self._heard: dict[str, _Heard] = {}  # key of an attempt -> its heartbeat

    def take(self, stage: str, kind: str, digest: str) -> Lease | Attempt | StageRecord:
        """The lease on some work; or the attempt of the driver that has it; or the work's record, if it is done."""
        while True:
            number = self._free(kind, digest)
            if not isinstance(number, int):
                return number
            parts = {"kind": kind, "digest": digest, "number": number}
            attempt = Attempt(
                **this_driver(),
                stage=stage,
                kind=kind,
                digest_of_work=digest,
                number=number,
                run=self.run,
                log=layout.LOG.at(**parts),
            )
            if write_record(self.store, layout.HELD.at(**parts), attempt):
                return Lease(self.store, attempt, self._beats)

    def holder(self, kind: str, digest: str) -> Attempt | None:
        """The attempt of the driver that has this work, unless that is known to be dead."""
        found = self._free(kind, digest)
        return found if isinstance(found, Attempt) else None

    def is_heard(self, attempt: Attempt) -> bool:
        """Whether the driver that has this attempt is known to be alive, not only not known to be dead."""
        heard = self._heard.get(layout.HELD.at(**_parts(attempt)))
        return heard is not None and heard.changed

    def _free(self, kind: str, digest: str) -> int | Attempt | StageRecord:
        """The number of the attempt that may be begun, or why none may be."""
        while True:
            keys = {entry.key for entry in self.store.list(layout.ATTEMPTS.at(kind=kind, digest=digest))}
            number = max((parts["number"] for parts in map(layout.HELD.parse, keys) if parts), default=0)
            parts = {"kind": kind, "digest": digest, "number": number}
            if number == 0:
                return 1
            if layout.ENDED.at(**parts) in keys:
                return self._committed(parts, keys) or number + 1
            attempt = read_record(self.store, layout.HELD.at(**parts), Attempt)
            if self._lives(attempt):
                return attempt
            why = f"nothing was heard of {attempt} for {PATIENCE_SECONDS:.0f} s"
            if runs_here(attempt.process) is False:
                why = f"the process of {attempt} is gone"
            taker = Attempt(**attempt.model_dump() | this_driver())
            end = AttemptEnd(how="taken over", why=why, by=str(taker), at=now())
            write_record(self.store, layout.ENDED.at(**parts), end)  # whether or not it was first: it has ended

    def _committed(self, parts: dict[str, str | int], keys: set[str]) -> StageRecord | None:
        """The record of the work, if the attempt was committed; None if it was not, or if its record was deleted."""
        end = read_record(self.store, layout.ENDED.at(**parts), AttemptEnd)
        if end.record is None:
            return None
        if layout.RECORDED.at(**parts) not in keys:
            return _settled(self.store, int(parts["number"]), end.record)
        with suppress(NotFound):
            return read_record(self.store, _record_key(end.record), StageRecord)
        return None

    def _lives(self, attempt: Attempt) -> bool:
        if runs_here(attempt.process) is False:
            return False
        key = layout.HELD.at(**_parts(attempt))
        beat, heard = last_beat(self.store, key), self._heard.get(key)
        if heard is None or beat != heard.beat:
            self._heard[key] = heard = _Heard(beat, self._clock(), heard is not None)
        return self._clock() - heard.since < PATIENCE_SECONDS


def _parts(attempt: Attempt) -> dict[str, str | int]:
    return {"kind": attempt.kind, "digest": attempt.digest_of_work, "number": attempt.number}


def _record_key(record: StageRecord) -> str:
    return layout.STAGE.at(kind=record.kind, digest=record.digest_of_work)


def _settled(store: Store, number: int, record: StageRecord) -> StageRecord:
    """Write the record of committed work, and then that it has been written."""
    written = recorded(store, _record_key(record), record)
    store.create(layout.RECORDED.at(kind=record.kind, digest=record.digest_of_work, number=number), b"")
    return written

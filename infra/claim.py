"""Claims on work: of several drivers that start the same work, one does it and the others wait until it has ended.

    <prefix>/<number>.json        a driver's claim, created if absent; the highest number counts
    <prefix>/<number>.json.beat   the driver's heartbeat: its text changes every few seconds

A driver that died is noticed at once on its own machine, since its process is gone, and on others by a heartbeat that
does not change. Those who wait measure that by their own clocks, so the machines' clocks need not agree.

A claim avoids doing work twice. It is not a lock: a driver that was suspended may wake up and find its work taken over.
So before it commits anything it calls `check`, and what it commits must be correct beside the other driver's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from infra import layout
from infra.background import repeated
from infra.errors import NotFound, PixnerdError, RecordError, TakenOver
from infra.records import Record, read_record, write_record
from infra.store import Store

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 90.0  # without a heartbeat; longer than an outage that a store's calls survive
ENDED = b"ended"  # the last heartbeat of a driver that ended in order


class DriverRecord(Record):
    driver: str
    host: str
    process: str  # see `process_of`


@dataclass(frozen=True)
class Claim:
    """A driver's claim while it works. It is sent to its workers, too."""

    store: Store
    home: str  # where the claims on this work lie
    number: int
    driver: str

    @property
    def key(self) -> str:
        return _key(self.home, self.number)

    def check(self) -> None:
        """Raise TakenOver if another driver has taken the work over."""
        newest = _newest(self.store, self.home)
        holder = read_record(self.store, _key(self.home, newest), DriverRecord) if newest else None
        if holder is None or holder.driver != self.driver:
            where = f" on {holder.host}" if holder else ""
            raise TakenOver(
                f"another driver{where} has taken this work over, as nothing was heard of this one for long",
                remedy="let the other one finish, or stop it and run again",
            )


@contextmanager
def held(
    store: Store, home: str, done: Callable[[], bool], waiting: Callable[[str], None], every: float = 1.0
) -> Iterator[Claim | None]:
    """Wait until no other driver has a claim, then hold one while the body runs; None if the work is `done` by then.

    While it waits it calls `waiting` with the other driver's host, every `every` seconds.
    """
    claim = _claimed(store, home, done, waiting, every)
    if claim is None:
        yield None
        return
    try:
        with beating(store, claim.key, BEAT_SECONDS):
            yield claim
    finally:
        with suppress(PixnerdError):  # others then notice that the heartbeat does not change
            store.put(f"{claim.key}{layout.BEAT}", ENDED)


@contextmanager
def beating(store: Store, key: str, every: float, also: Callable[[], object] = lambda: None) -> Iterator[None]:
    """While the body runs, the heartbeat of the record at this key goes on, and `also` is called after each beat."""
    beats = count(1)

    def beat() -> None:
        with suppress(PixnerdError):  # the store is away: nobody else can read the heartbeat either
            store.put(f"{key}{layout.BEAT}", str(next(beats)).encode())
            also()

    with repeated(beat, every, "heartbeat", at_once=True):
        yield


def last_beat(store: Store, key: str) -> bytes:
    """The text of a record's heartbeat; empty before the first."""
    with suppress(NotFound):
        return store.get(f"{key}{layout.BEAT}")
    return b""


def drop(store: Store, key: str) -> None:
    """Delete a record with its heartbeat."""
    store.delete(key)
    store.delete(f"{key}{layout.BEAT}")


def _claimed(
    store: Store, home: str, done: Callable[[], bool], waiting: Callable[[str], None], every: float
) -> Claim | None:
    driver = uuid.uuid4().hex[:12]
    own = DriverRecord(driver=driver, host=socket.gethostname(), process=process_of(os.getpid()))
    pause = threading.Event()
    other: _OtherClaim | None = None
    while not done():
        newest = _newest(store, home)
        if newest and (other is None or other.number != newest):
            other = _OtherClaim(store, home, newest)
        if newest and other is not None and other.alive():
            waiting(other.host)
            pause.wait(every)
            continue
        claim = Claim(store, home, newest + 1, driver)
        if write_record(store, claim.key, own):
            for number in range(newest, 0, -1):
                if not _drop(store, home, number):
                    break  # its own driver has dropped those before it
            return claim
    return None


class _OtherClaim:
    """Another driver's claim, and its heartbeat as seen from here."""

    def __init__(self, store: Store, home: str, number: int) -> None:
        self.store, self.number, self.key = store, number, _key(home, number)
        self.host, self.process = "", ""
        with suppress(NotFound, RecordError):  # dropped by a newer driver, or damaged: then only the heartbeat counts
            record = read_record(store, self.key, DriverRecord)
            self.host, self.process = record.host, record.process
        self.beat: bytes | None = None
        self.since = time.monotonic()

    def alive(self) -> bool:
        beat = last_beat(self.store, self.key)
        if beat == ENDED or runs_here(self.process) is False:
            return False
        if beat != self.beat:
            self.beat, self.since = beat, time.monotonic()
        return time.monotonic() - self.since < PATIENCE_SECONDS


def _key(home: str, number: int) -> str:
    return layout.DRIVER.at(home=home, number=number)


def _newest(store: Store, home: str) -> int:
    """The highest claim's number; 0 if there is none."""
    return max((layout.DRIVER.parts(key)["number"] for key in layout.DRIVER.keys(store, home=home)), default=0)


def _drop(store: Store, home: str, number: int) -> bool:
    key = _key(home, number)
    existed = store.exists(key)
    drop(store, key)
    return existed


def process_of(pid: int) -> str:
    """Identifies a running process for good, by boot of the machine, namespace, number and start; else empty."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else f"{boot} {os.readlink(f'/proc/{pid}/ns/pid')} {pid} {fields[18]}"
    except OSError:
        return ""


def runs_here(process: str) -> bool | None:
    """Whether it still runs; None if it is not a process of this machine, or not visible in this namespace."""
    own, other = process_of(os.getpid()).split(), process.split()
    if len(other) != 4 or len(own) != 4 or other[:2] != own[:2]:
        return None
    return process_of(int(other[2])) == process

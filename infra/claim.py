"""Whose work it is: of several drivers that start the same work, one does it and the others wait until it has ended.

    <prefix>/<number>.json        a driver's claim, create-if-absent; the highest number is the one that counts
    <prefix>/<number>.json.beat   another text every few seconds, while that driver lives

A driver that died is known at once on its own machine, by its process, and elsewhere by a beat that stands still: the
one who waits measures that with a clock of its own, so the machines' clocks need not agree. A claim saves work that
would be done twice. It is no lock: a driver that was only asleep may wake up and find its work taken, so whatever it
commits must be right beside another driver's, and `check` comes first.
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
from pathlib import Path

from infra import layout
from infra.errors import NotFound, PixnerdError, RecordError, TakenOver
from infra.records import Record, read_record, write_record
from infra.store import Store

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 90.0  # without a beat: longer than an outage of the store that is ridden out
ENDED = b"ended"


class DriverRecord(Record):
    driver: str
    host: str
    process: str  # told from every other process that this machine ever ran


@dataclass(frozen=True)
class Claim:
    """What a driver holds while it works; it travels to its workers."""

    store: Store
    home: str  # where the claims on this work lie
    number: int
    driver: str

    @property
    def key(self) -> str:
        return _key(self.home, self.number)

    def check(self) -> None:
        """Raises if another driver has taken the run over."""
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
    """The claim, once no other driver holds it; None if the work is `done` by then.

    `waiting` is told, again and again, on which host the driver is that is waited for.
    """
    claim = _claimed(store, home, done, waiting, every)
    if claim is None:
        yield None
        return
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(claim, over), name="claim", daemon=True)
    beat.start()
    try:
        yield claim
    finally:
        over.set()
        beat.join()
        with suppress(PixnerdError):  # then it is found out by the beat
            store.put(f"{claim.key}{layout.BEAT}", ENDED)


def _claimed(
    store: Store, home: str, done: Callable[[], bool], waiting: Callable[[str], None], every: float
) -> Claim | None:
    driver = uuid.uuid4().hex[:12]
    own = DriverRecord(driver=driver, host=socket.gethostname(), process=process_of(os.getpid()))
    pause = threading.Event()
    watched: _Watched | None = None
    while not done():
        newest = _newest(store, home)
        if newest and (watched is None or watched.number != newest):
            watched = _Watched(store, home, newest)
        if newest and watched is not None and watched.alive():
            waiting(watched.host)
            pause.wait(every)
            continue
        claim = Claim(store, home, newest + 1, driver)
        if write_record(store, claim.key, own):
            for number in range(newest, 0, -1):
                if not _drop(store, home, number):
                    break  # those before it went when it came
            return claim
    return None


class _Watched:
    """Another driver's claim, as it looks from here."""

    def __init__(self, store: Store, home: str, number: int) -> None:
        self.store, self.number, self.key = store, number, _key(home, number)
        self.host, self.process = "", ""
        with suppress(NotFound, RecordError):  # dropped by a newer one, or damaged: the beat alone tells
            record = read_record(store, self.key, DriverRecord)
            self.host, self.process = record.host, record.process
        self.beat: bytes | None = None
        self.since = time.monotonic()

    def alive(self) -> bool:
        beat = b""
        with suppress(NotFound):
            beat = self.store.get(f"{self.key}{layout.BEAT}")
        if beat == ENDED or runs_here(self.process) is False:
            return False
        if beat != self.beat:
            self.beat, self.since = beat, time.monotonic()
        return time.monotonic() - self.since < PATIENCE_SECONDS


def _beat(claim: Claim, over: threading.Event) -> None:
    count = 0
    while True:
        count += 1
        with suppress(PixnerdError):  # the store is away: whoever waits cannot read the beat either
            claim.store.put(f"{claim.key}{layout.BEAT}", f"{claim.driver} {count}".encode())
        if over.wait(BEAT_SECONDS):
            return


def _key(home: str, number: int) -> str:
    return layout.DRIVER.at(home=home, number=number)


def _newest(store: Store, home: str) -> int:
    """The highest claim's number; 0 if there is none."""
    return max((layout.DRIVER.parts(key)["number"] for key in layout.DRIVER.keys(store, home=home)), default=0)


def _drop(store: Store, home: str, number: int) -> bool:
    key = _key(home, number)
    there = store.exists(key)
    store.delete(key)
    store.delete(f"{key}{layout.BEAT}")
    return there


def process_of(pid: int) -> str:
    """A running process, told by its machine's boot and its namespace, number and start; empty if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else f"{boot} {os.readlink(f'/proc/{pid}/ns/pid')} {pid} {fields[18]}"
    except OSError:
        return ""


def runs_here(process: str) -> bool | None:
    """Whether it still runs; None if it was never one of this machine's that can be seen from here."""
    here, there = process_of(os.getpid()).split(), process.split()
    if len(there) != 4 or len(here) != 4 or there[:2] != here[:2]:
        return None
    return process_of(int(there[2])) == process

"""Claims: of several drivers one works; whoever died, ended or fell silent is followed by one other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra import claim as claims
from infra import layout
from infra.claim import Claim, DriverRecord, held
from infra.errors import TakenOver
from infra.records import write_record
from infra.store import Store, open_store

HOME = "training/work"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def never() -> bool:
    return False


def nobody(host: str) -> None:
    pytest.fail(f"it waited for a driver on {host}")


def claim_of(store: Store, process: str, number: int = 1) -> Claim:
    """The claim of a driver that is not here, and does not beat."""
    write_record(
        store, layout.DRIVER.at(home=HOME, number=number), DriverRecord(driver="other", host="far", process=process)
    )
    return Claim(store, HOME, number, "other")


def test_a_second_driver_waits_until_the_first_has_ended(store: Store):
    waits, ended, order = threading.Event(), threading.Event(), []

    def second() -> None:
        with held(store, HOME, never, lambda host: waits.set(), every=0.01) as claim:
            order.append("second")
            assert ended.is_set()
            assert claim is not None
            claim.check()

    with ThreadPoolExecutor(1) as pool:
        with held(store, HOME, never, nobody) as claim:
            other = pool.submit(second)
            assert waits.wait(30)
            assert claim is not None
            claim.check()
            order.append("first")
            ended.set()
        other.result(30)
    assert order == ["first", "second"]
    with pytest.raises(TakenOver):
        claim.check()


def test_who_waits_is_free_once_the_work_is_done(store: Store):
    done = threading.Event()
    with (
        held(store, HOME, never, nobody),
        held(store, HOME, done.is_set, lambda host: done.set(), every=0.01) as second,
    ):
        assert second is None


def test_a_driver_that_was_killed_is_followed_at_once(store: Store):
    """Its process is known to be gone, so nobody waits for its beat to stand still."""
    script = f"""
import os
from infra.claim import held
from infra.store import open_store
with held(open_store({store.url!r}), {HOME!r}, lambda: False, print):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with held(store, HOME, never, nobody) as claim:
        assert claim is not None
        assert claim.number == 2
        assert [entry.key for entry in store.list(layout.DRIVER.under(home=HOME)) if entry.key.endswith(".json")] == [
            claim.key
        ]


def test_a_number_that_another_process_has_by_now_is_another_process(store: Store):
    process = claims.process_of(os.getpid())
    claim_of(store, process[:-1] + ("1" if process[-1] != "1" else "2"))
    with held(store, HOME, never, nobody):
        pass


def test_a_driver_elsewhere_is_followed_when_its_beat_stands_still(store: Store, monkeypatch: pytest.MonkeyPatch):
    """The clock that counts is that of the one who waits."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    theirs, asked = claim_of(store, "another boot of another machine"), []

    def waiting(host: str) -> None:
        asked.append(now[0])
        if now[0] < 1200:
            store.put(f"{theirs.key}.beat", str(now[0]).encode())
        now[0] += 50

    with held(store, HOME, never, waiting, every=0.0) as claim:
        assert asked == [1000, 1050, 1100, 1150, 1200, 1250]
        assert claim is not None
        claim.check()
    with pytest.raises(TakenOver, match="taken this work over"):
        theirs.check()


def test_of_many_that_follow_a_dead_driver_one_works_at_a_time(store: Store):
    dead = claim_of(store, "another boot of another machine")
    store.put(f"{dead.key}{layout.BEAT}", claims.ENDED)
    working, most, lock = [0], [0], threading.Lock()

    def work(_: int) -> None:
        with held(store, HOME, never, lambda host: None, every=0.005):
            with lock:
                working[0] += 1
                most[0] = max(most[0], working[0])
            with lock:
                working[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most == [1]

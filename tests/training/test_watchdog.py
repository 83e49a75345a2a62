"""A rank that stands still is ended, with a word on where it stands; one that works is left alone."""

from __future__ import annotations

import queue
import threading

from training.watchdog import HUNG, Watchdog


def test_a_rank_without_a_step_says_where_it_stands_and_ends():
    said: queue.Queue[str] = queue.Queue()
    ended: queue.Queue[int] = queue.Queue()
    free = threading.Event()
    watchdogs: list[Watchdog] = []

    def stuck_in_a_read() -> None:
        watchdogs.append(Watchdog(0.05, 3, said.put, ended.put))
        free.wait()

    thread = threading.Thread(target=stuck_in_a_read)
    thread.start()
    text = said.get(timeout=30)
    assert text.startswith("rank 3 on ")
    assert "has taken no step for 0.05 s: it is at wait in threading.py" in text
    assert "from stuck_in_a_read in test_watchdog.py" in text
    assert ended.get(timeout=30) == HUNG
    free.set()
    thread.join()


def test_one_that_beats_is_left_alone():
    said: queue.Queue[str] = queue.Queue()
    watchdog = Watchdog(3600, 0, said.put, lambda code: None)
    watchdog.beat()
    watchdog.close()
    assert said.empty()

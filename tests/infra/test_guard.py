"""However the work ends, the command ends with an exit code and one line, and leaves no process."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from infra import guard
from infra.errors import PixnerdError

SETUP = """
import os, signal, subprocess, sys, threading, time
from infra import guard
from infra.errors import ClusterError, SettingsError

def explain(error):
    return f"error: {error.message}: {error.remedy}", error.exit_code

def say(*words):
    print(*words, flush=True)

def orphan():
    '''A process of the work that nobody in the work waits for, and that stays out of its group.'''
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

def wait():
    say(os.getpid(), orphan())
    threading.Event().wait()
"""
RUN = "\nsys.exit(guard.run(work, explain))\n"


class Ended(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


def running(work: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SETUP + work + RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(guard.__file__).parents[1])},
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=60)
    return Ended(process.returncode, out.splitlines(), err.splitlines())


def gone(*pids: str) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_ends_the_work_and_all_that_it_started(number: int, code: int):
    with running("work = wait") as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        process.send_signal(number)
        assert ended(process) == Ended(code, [], [guard.STOPPED])
        assert gone(*pids)


def test_the_work_may_end_well_and_is_not_interrupted_twice():
    work = """
def work():
    try:
        wait()
    finally:
        say("ending")
        sys.stdin.readline()
        say("ended")
"""
    with running(work.replace("sys.stdin.readline()", "time.sleep(0.3)")) as process:
        assert process.stdout is not None
        work_pid = int(process.stdout.readline().split()[0])
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "ending\n"
        os.kill(work_pid, signal.SIGINT)  # as a terminal does, which asks all processes of a group
        process.send_signal(signal.SIGTERM)  # the same wish
        assert ended(process) == Ended(143, ["ended"], [guard.STOPPED])


@pytest.mark.parametrize("twice", [False, True])
def test_work_that_does_not_end_is_ended(twice: bool):
    work = f"""
guard.GRACE, guard.ONE_ASKING = {600 if twice else 0.2}, 0.0
def work():
    while True:
        try:
            wait()
        except KeyboardInterrupt:
            say("no")
"""
    with running(work) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "no\n"
        if twice:
            process.send_signal(signal.SIGINT)
        found = ended(process)
        assert (found.code, found.err) == (143, [guard.STOPPED])
        assert gone(*pids)


def test_an_error_that_a_signal_makes_is_not_told():
    work = """
def work():
    try:
        wait()
    except KeyboardInterrupt:
        raise ClusterError("Ray says something", remedy="no") from None
"""
    with running(work) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert ended(process) == Ended(143, [], [guard.STOPPED])


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("def work(): say('done'); return 0", Ended(0, ["done"], [])),
        ("def work(): return 3", Ended(3, [], [])),
        ("def work(): sys.exit(4)", Ended(4, [], [])),
        ("def work(): raise SettingsError('wrong', remedy='mend it')", Ended(2, [], ["error: wrong: mend it"])),
        ("def work(): print('python', file=sys.stderr); os.write(2, b'native'); return 0", Ended(0, [], ["python"])),
        ("def work(): orphan(); return 0", Ended(0, [], [])),
    ],
)
def test_work_that_ends_by_itself(work: str, expected: Ended):
    assert ended(running(work)) == expected


@pytest.mark.parametrize(
    ("work", "says"),
    [
        ("os.write(2, b'terminate called: std::bad_alloc'); os.abort()", "too little memory.*ulimit -v"),
        ("os.write(2, b'thread: Resource temporarily unavailable'); os.abort()", "no more threads.*ulimit -u"),
        ("os.write(2, b'*** SIGABRT received ***'); os.abort()", r"within a library.*\(SIGABRT\).*--debug"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"\(SIGKILL\).*out-of-memory"),
        ("os.kill(os.getpid(), signal.SIGBUS)", r"\(SIGBUS\).*/dev/shm"),
        ("os._exit(7)", r"\(exit code 7\)"),
    ],
)
def test_work_that_ends_without_a_word(work: str, says: str):
    found = ended(running(f"def work(): orphan(); {work}"))
    assert (found.code, found.out, len(found.err)) == (1, [], 1), found
    assert re.search(says, found.err[0]), found.err


def test_a_process_that_is_needed_and_dies_ends_the_work():
    work = """
def work():
    needed = subprocess.Popen(["sleep", "600"])
    guard.watch("the raylet", needed.pid)
    say(os.getpid(), needed.pid)
    threading.Event().wait()
"""
    with running(work) as process:
        assert process.stdout is not None
        pids = process.stdout.readline().split()
        os.kill(int(pids[1]), signal.SIGKILL)
        found = ended(process)
        assert (found.code, len(found.err)) == (1, 1)
        assert found.err[0].startswith("error: the raylet has ended: ")
        assert gone(*pids)


def test_a_process_that_was_needed_may_die():
    work = """
def work():
    needed = subprocess.Popen(["sleep", "600"])
    guard.watch("the raylet", needed.pid)
    guard.unwatch()
    needed.kill()
    needed.wait()
    return 0
"""
    assert ended(running(work)) == Ended(0, [], [])


def test_who_waits_is_killed_and_the_work_with_it():
    with running("work = wait") as process:
        assert process.stdout is not None
        pid = process.stdout.readline().split()[0]
        watched = os.pidfd_open(int(pid))
        process.kill()
        assert select.select([watched], [], [], 60)[0], "the work goes on alone"
        os.close(watched)


def test_in_a_process_where_somebody_listens_it_stays_there(capsys: pytest.CaptureFixture[str]):
    asked: list[Callable[[], None]] = []

    def work() -> int:
        asked.append(lambda: None)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it was not interrupted")

    def explain(error: Exception) -> tuple[str, int]:
        assert isinstance(error, PixnerdError)
        return error.message, 1

    before = signal.getsignal(signal.SIGTERM)
    assert guard.run(work, explain) == 143
    assert capsys.readouterr().err == f"{guard.STOPPED}\n"
    assert len(asked) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert not guard.in_charge()


def test_work_that_has_to_save_something_gets_more_time():
    work = """
def work():
    try:
        wait()
    finally:
        guard.more_time(30)
        time.sleep(2)
        say("saved")
"""
    with running("guard.GRACE = 1.5\n" + work) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert ended(process) == Ended(143, ["saved"], [guard.STOPPED])

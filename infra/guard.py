"""Runs a command as two processes, one that works and one that waits for it, so that every end is an orderly one.

Ray and PyTorch abort a process when they cannot go on. They print their state, and nothing in that process can tell the
user what to do. So the work is done in a child of a small process that loads no such library. The parent forwards the
first signal, kills work that does not end by itself, kills processes that the work has left behind, and prints one line
about what happened.

    exit code 130, 143 or 129    stopped by SIGINT, SIGTERM or SIGHUP; the same command goes on from there
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from infra import causes, scratch
from infra.errors import ClusterError, PixnerdError

STOPPED = "stopped; the same command goes on from here"
INTERRUPTED = 128 + signal.SIGINT
GRACE = 8.0  # seconds in which the work may end by itself after a signal
ONE_ASKING = 1.0  # seconds in which a second signal counts as the first: some send it to a process and to its group
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # options of prctl

Explain = Callable[[Exception], tuple[str, int]]  # an error -> what to print, and the exit code

_guarded = False
_reports: int | None = None  # in the working process: the pipe to the waiting one


def run(work: Callable[[], int], explain: Explain, *, apart: bool = True) -> int:
    """Do the work, and return the exit code of the command.

    `apart`: what libraries write directly to file descriptor 2 is kept off the terminal.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__ or threading.active_count() > 1:
        return _in_this_process(work, explain)  # output is captured here, as in tests, or a fork is unsafe
    return _Watch(work, explain, apart).run()


def watch(name: str, pid: int) -> None:
    """Called by the work, which cannot go on without this process: it is stopped when the process ends."""
    _tell(f"watch {pid} {name}")


def unwatch() -> None:
    """Called by the work: the watched processes may end now."""
    _tell("unwatch")


def more_time(seconds: float) -> None:
    """Called by the work after a signal: to end orderly it needs so many seconds more."""
    _tell(f"more {seconds}")


def in_charge() -> bool:
    """Whether this module handles signals, so that no other code needs to."""
    return _guarded


def _tell(line: str) -> None:
    if _reports is not None:
        with suppress(OSError):  # the waiting process is gone, and this one is about to be killed
            os.write(_reports, f"{line}\n".encode())


# In the working process


def _in_this_process(work: Callable[[], int], explain: Explain) -> int:
    with _interruptible() as received:
        code = _exit_code(work, explain, received)
    return _stopped(received[0] if received else signal.SIGINT) if code == INTERRUPTED else code


def _stopped(number: int) -> int:
    print(STOPPED, file=sys.stderr)
    return 128 + number


def _exit_code(work: Callable[[], int], explain: Explain, received: list[int]) -> int:
    """Do the work; its exit code, or INTERRUPTED if it failed after a signal, with whatever error.

    `received`: the signals so far.
    """
    try:
        code = work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001 - `explain` tells bugs from other errors
        if received:
            return INTERRUPTED
        text, code = explain(error)
        print(text, file=sys.stderr)
    return INTERRUPTED if received and code else code


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first signal raises KeyboardInterrupt in the body, the only exception that interrupts Ray's waits.

    Later signals do not interrupt the body's clean-up. Yields the list of signals received.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can set handlers
        return
    global _guarded
    before = {number: signal.signal(number, interrupt) for number in _handled()}
    _guarded = True
    try:
        yield received
    finally:
        _guarded = False
        for number, handler in before.items():
            signal.signal(number, handler)


def _handled() -> list[signal.Signals]:
    """The signals that stop the command; not SIGHUP under `nohup`, which lets it go on when the terminal is closed."""
    return [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


# In the waiting process


class _Watch:
    """The waiting process: it forks the working one, and ends it if need be."""

    def __init__(self, work: Callable[[], int], explain: Explain, apart: bool) -> None:
        self.work, self.explain = work, explain
        self.native_stderr = os.memfd_create("stderr") if apart else None
        self.needed: dict[int, str] = {}  # pidfd of a process that the work needs -> its name
        self.first_signal: int | None = None
        self.lost: str | None = None  # name of a needed process that has ended
        self.code: int | None = None  # the exit code that the work reported
        self.stopped_at = self.deadline = float("inf")
        self.incomplete_report = b""

    def run(self) -> int:
        _prctl(_SUBREAPER, 1)  # processes that the work leaves behind become this one's children
        self.reports, reports = os.pipe()
        self.woken, wake = os.pipe()
        for descriptor in (self.reports, self.woken, wake):
            os.set_blocking(descriptor, False)
        numbers = [*_handled(), signal.SIGCHLD]
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            parent = os.getpid()
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the child has handlers of its own
            self.child = os.fork()
            if self.child == 0:
                self._work(parent, reports)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(reports)
            status = self._wait()
            _end_orphans()
            return self._conclude(status)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _work(self, parent: int, reports: int) -> NoReturn:
        """The child. It ends here, by os._exit, so that no library's exit handler can hang or crash."""
        global _reports
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with _interruptible() as received:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                _prctl(_DEATH_SIGNAL, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                _reports = reports
                if self.native_stderr is not None:
                    _set_apart(self.native_stderr)
                code = _exit_code(self.work, self.explain, received)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            _tell(f"code {code}")
            os._exit(code)

    def _wait(self) -> int:
        """Wait until the work has ended; returns its status as `os.waitpid` does."""
        while True:
            poller = select.poll()
            for descriptor in (self.woken, self.reports, *self.needed):
                poller.register(descriptor, select.POLLIN)
            left = self.deadline - time.monotonic()
            ready = poller.poll(None if left == float("inf") else max(0.0, left) * 1000)
            self._read_reports()
            ended = [self.needed[descriptor] for descriptor, _ in ready if descriptor in self.needed]
            if ended and self.first_signal is None and self.lost is None:
                self.lost = ended[0]
                self._stop()
            for number in _read(self.woken):
                self._handle(number)
            if time.monotonic() >= self.deadline:
                os.kill(self.child, signal.SIGKILL)
                self.deadline = float("inf")
            while (child := _reaped()) is not None:
                if child[0] == self.child:
                    self._read_reports()
                    return child[1]

    def _handle(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if self.first_signal is None:
            self.first_signal = number
            if self.lost is None:
                self._stop()
        elif time.monotonic() - self.stopped_at > ONE_ASKING:
            self.deadline = time.monotonic()  # a user who asks twice does not want to wait

    def _stop(self) -> None:
        """Ask the work to end: by SIGINT, since Ray has its own handler of SIGTERM while it starts."""
        self.needed = {}
        self.stopped_at = time.monotonic()
        self.deadline = self.stopped_at + GRACE
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGINT)

    def _read_reports(self) -> None:
        *lines, self.incomplete_report = (self.incomplete_report + _read(self.reports)).split(b"\n")
        for line in lines:
            what, _, rest = line.decode().partition(" ")
            if what == "code":
                self.code = int(rest)
            elif what == "more":
                self.deadline += float(rest)  # still never, if nobody has asked the work to end
            elif what == "unwatch":
                self.needed = {}
            elif what == "watch" and self.first_signal is None and self.lost is None:
                pid, _, name = rest.partition(" ")
                with suppress(ProcessLookupError):
                    self.needed[os.pidfd_open(int(pid))] = name

    def _conclude(self, status: int) -> int:
        """The command's exit code; prints what the work could not print itself."""
        if self.code == 0:
            return 0
        scratch.sweep()  # killed processes could not do so
        if self.first_signal is not None or (self.code == INTERRUPTED and self.lost is None):
            return _stopped(self.first_signal or signal.SIGINT)
        if self.code is not None and self.code != INTERRUPTED:
            return self.code
        text, code = self.explain(self._failure(status))
        print(text, file=sys.stderr)
        return code

    def _failure(self, status: int) -> PixnerdError:
        """Why the work has ended without reporting an exit code."""
        if self.lost is not None:
            return ClusterError(
                f"{self.lost} has ended: it was killed, or has failed",
                remedy=f"if nobody killed it, look for the out-of-memory killer in `dmesg`; {causes.AGAIN}",
            )
        output = b"" if self.native_stderr is None else os.pread(self.native_stderr, 1 << 20, 0)
        text = output.decode(errors="replace")
        if lack := causes.known_phrase(text):
            return lack
        if "Failed to connect to GCS" in text:
            return ClusterError(
                "the head of the Ray cluster does not answer any more", remedy=f"start it; {causes.AGAIN}"
            )
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        name = signal.Signals(number).name if number else f"exit code {os.WEXITSTATUS(status)}"
        if number == signal.SIGKILL:
            remedy = "free memory, or have fewer workers, if it was the out-of-memory killer (see `dmesg`)"
        elif number == signal.SIGBUS:
            remedy = "free space on the disks of /dev/shm, of TMPDIR and of the store"
        else:
            remedy = "--debug shows what it said"
        return ClusterError(f"the work ended within a library, or from outside ({name})", remedy=remedy)


def _set_apart(native_stderr: int) -> None:
    """Redirect file descriptor 2, to which libraries write; Python's own standard error stays what it was."""
    stream = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
    os.dup2(native_stderr, 2)
    sys.stderr = sys.__stderr__ = stream  # type: ignore[misc]


def _prctl(what: int, value: int) -> None:
    import ctypes  # here, since it takes as long as the rest of this module

    ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def _reaped() -> tuple[int, int] | None:
    """The pid and status of a child that has ended; None if there is none."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _end_orphans() -> None:
    """Kill the processes that the work has left behind, and those that they have started."""
    deadline = time.monotonic() + GRACE / 2  # a process that hangs in a system call is not waited for
    while (left := children(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if _reaped() is None:
            time.sleep(0.01)


def children(parent: int) -> list[int]:
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) == parent:
                pids.append(int(folder.name))
    return pids

"""A command as two processes: one that works, and one that waits for it, so that the command ends well in every case.

Ray and PyTorch end a process by themselves where they see no way on. They print their state, and nobody is left in that
process who could say what to do. So the work is done in a child of a small process that has loaded nothing of them. It
passes on a signal, once; it ends the work that does not end by itself; it ends what the work started and left behind;
and it says in one line what happened.

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
GRACE = 8.0  # seconds in which the work may end by itself
ONE_ASKING = 1.0  # seconds in which a second signal is the same wish: some send it to a process and to its group
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # of prctl

Explain = Callable[[Exception], tuple[str, int]]  # what to print of an error, and the exit code

_guarded = False
_reports: int | None = None  # in the working process: where it tells the waiting one something


def run(work: Callable[[], int], explain: Explain, *, apart: bool = True) -> int:
    """Do the work, and return the exit code of the command.

    `apart`: what libraries write to standard error behind Python's back is kept off the terminal.
    """
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__ or threading.active_count() > 1:
        return _alone(work, explain)  # somebody in this very process listens, as tests do
    return _Watch(work, explain, apart).run()


def watch(name: str, pid: int) -> None:
    """In the work: without this process it cannot go on."""
    _tell(f"watch {pid} {name}")


def unwatch() -> None:
    """In the work: those processes may end now."""
    _tell("unwatch")


def in_charge() -> bool:
    """Whether a signal ends the work as it is meant to, so that nobody else needs to take care."""
    return _guarded


def _tell(line: str) -> None:
    if _reports is not None:
        with suppress(OSError):  # nobody waits any more: this process is about to be killed
            os.write(_reports, f"{line}\n".encode())


# The work


def _alone(work: Callable[[], int], explain: Explain) -> int:
    with _interruptible() as asked:
        code = _done(work, explain, asked)
    return _stopped(asked[0] if asked else signal.SIGINT) if code == INTERRUPTED else code


def _stopped(number: int) -> int:
    print(STOPPED, file=sys.stderr)
    return 128 + number


def _done(work: Callable[[], int], explain: Explain, asked: list[int]) -> int:
    """The work's exit code; INTERRUPTED if it ended because it was asked to, whatever error that made."""
    try:
        code = work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001 - the last line of defence: whoever explains knows what is a bug
        if asked:
            return INTERRUPTED
        text, code = explain(error)
        print(text, file=sys.stderr)
    return INTERRUPTED if asked and code else code


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Each of the signals raises KeyboardInterrupt in the body, as Ctrl-C does; it alone gets through waits of Ray's.

    That happens once: what the body then does to end well is not interrupted again.
    """
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's business
        return
    global _guarded
    before = {number: signal.signal(number, interrupt) for number in _handled()}
    _guarded = True
    try:
        yield asked
    finally:
        _guarded = False
        for number, handler in before.items():
            signal.signal(number, handler)


def _handled() -> list[signal.Signals]:
    """Whoever started the command with `nohup` wants it to go on when the terminal is closed."""
    return [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


# The waiting


class _Watch:
    """The process that waits."""

    def __init__(self, work: Callable[[], int], explain: Explain, apart: bool) -> None:
        self.work, self.explain = work, explain
        self.native = os.memfd_create("stderr") if apart else None
        self.needed: dict[int, str] = {}  # a file descriptor of a process that the work needs -> its name
        self.asked: int | None = None  # the signal that came first
        self.lost: str | None = None  # the process that the work needed and that is no more
        self.code: int | None = None  # as the work told it
        self.since = self.deadline = float("inf")
        self.heard = b""

    def run(self) -> int:
        _prctl(_SUBREAPER, 1)  # orphans of the work become children of this process
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
        """The child. It ends here, so that nothing of what a library does at exit can hang or crash."""
        global _reports
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with _interruptible() as asked:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                _prctl(_DEATH_SIGNAL, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                _reports = reports
                if self.native is not None:
                    _set_apart(self.native)
                code = _done(self.work, self.explain, asked)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            _tell(f"code {code}")
            os._exit(code)

    def _wait(self) -> int:
        """Until the work has ended: how it did."""
        while True:
            poller = select.poll()
            for descriptor in (self.woken, self.reports, *self.needed):
                poller.register(descriptor, select.POLLIN)
            left = self.deadline - time.monotonic()
            ready = poller.poll(None if left == float("inf") else max(0.0, left) * 1000)
            self._hear()
            if any(descriptor in self.needed for descriptor, _ in ready) and self.asked is None and self.lost is None:
                self.lost = next(self.needed[d] for d, _ in ready if d in self.needed)
                self._stop()
            for number in _read(self.woken):
                self._signalled(number)
            if time.monotonic() >= self.deadline:
                os.kill(self.child, signal.SIGKILL)
                self.deadline = float("inf")
            while (ended := _reaped()) is not None:
                if ended[0] == self.child:
                    self._hear()
                    return ended[1]

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if self.asked is None:
            self.asked = number
            if self.lost is None:
                self._stop()
        elif time.monotonic() - self.since > ONE_ASKING:
            self.deadline = time.monotonic()  # whoever asks again does not want to wait

    def _stop(self) -> None:
        """SIGINT, since Ray puts a handler of its own on SIGTERM while it starts."""
        self.needed = {}
        self.since = time.monotonic()
        self.deadline = self.since + GRACE
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGINT)

    def _hear(self) -> None:
        """What the work has told."""
        *lines, self.heard = (self.heard + _read(self.reports)).split(b"\n")
        for line in lines:
            what, _, rest = line.decode().partition(" ")
            if what == "code":
                self.code = int(rest)
            elif what == "unwatch":
                self.needed = {}
            elif what == "watch" and self.asked is None and self.lost is None:
                pid, _, name = rest.partition(" ")
                with suppress(ProcessLookupError):
                    self.needed[os.pidfd_open(int(pid))] = name

    def _conclude(self, status: int) -> int:
        """The command's exit code, once what there is to say has been said."""
        if self.code == 0:
            return 0
        scratch.sweep()  # whoever was killed could not
        if self.asked is not None or (self.code == INTERRUPTED and self.lost is None):
            return _stopped(self.asked or signal.SIGINT)
        if self.code is not None and self.code != INTERRUPTED:
            return self.code
        text, code = self.explain(self._failure(status))
        print(text, file=sys.stderr)
        return code

    def _failure(self, status: int) -> PixnerdError:
        """Why the work has ended without a word."""
        if self.lost is not None:
            return ClusterError(
                f"{self.lost} has ended: it was killed, or has failed",
                remedy=f"if nobody killed it, look for the out-of-memory killer in `dmesg`; {causes.AGAIN}",
            )
        said = b""
        if self.native is not None:
            said = os.pread(self.native, 1 << 20, 0)
        text = said.decode(errors="replace")
        if found := causes.known_words(text):
            return found
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


def _set_apart(native: int) -> None:
    """What libraries write to standard error goes there; what Python writes goes where it always went."""
    stream = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
    os.dup2(native, 2)
    sys.stderr = sys.__stderr__ = stream  # type: ignore[misc]


def _prctl(what: int, value: int) -> None:
    import ctypes  # late, since it takes as long as all the rest of this module

    ctypes.CDLL(None, use_errno=True).prctl(what, value, 0, 0, 0)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def _reaped() -> tuple[int, int] | None:
    """A child that has ended, and how."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _end_orphans() -> None:
    """Kill what the work has started and not waited for, and what that has started."""
    deadline = time.monotonic() + GRACE / 2  # a process in a system call that does not end is not waited for
    while (left := children(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if _reaped() is None:
            time.sleep(0.01)


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found

"""The only place that starts or joins a Ray cluster, and the line by which far-away work reports to the terminal.

On a laptop `connect()` starts a local Ray whose CPUs and memory are bounded on purpose: left alone, Ray takes 30 % of
the machine's memory for objects that this system never puts there (image bytes go to the store, not through Ray).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from infra import guard, scratch
from infra.causes import exhausted, first_line
from infra.config import Settings, operational
from infra.errors import ClusterError
from infra.head import check_head, own_token


class ClusterSettings(Settings):
    address: str | None = operational(None, description="a Ray cluster to join; none: start one on this machine")
    cpus: int | None = operational(None, ge=1, description="CPUs of the local cluster; none: all of this machine's")
    object_store_mb: int = operational(256, ge=80, description="memory of the local cluster for Ray's own objects")
    dashboard: bool = operational(False, description="Ray's own page of the local cluster")


# What a local Ray and its workers find in their environment, unless the user set it.
_LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no calls home
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # how long it takes to notice that a training run has ended
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else every task that asks for no GPU warns about it
    "RAY_worker_niceness": "0",  # Ray's workers step aside for everything else, but here they are the work
    # A training step frees and takes large blocks over and over; giving them back to the system each time costs 10 %.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 10**9),
}


# The processes of a local cluster without which nothing can go on, as the system calls them, and as we do.
_NEEDED = {
    "gcs_server": "the head process of Ray on this machine (gcs_server)",
    "raylet": "Ray's raylet on this machine",
}

_STARTS = 3  # of a local Ray that gives up, after half a minute, since the machine is busy
_ANSWER_SECONDS = 5.0  # a mailbox on a busy machine takes less

_open = ExitStack()  # what a local cluster needs for as long as it is there


def connect(settings: ClusterSettings | None = None) -> None:
    """Join the cluster, or start a local one; a second call finds the first one's and does nothing."""
    import ray

    settings = settings or ClusterSettings()
    if ray.is_initialized():
        return
    for name, value in _LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    ray._private.worker.print_to_stdstream = _to_standard_error
    if address:
        check_head(address)
    else:
        own_token()
    try:
        with _handlers_kept():
            if address:
                ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
            else:
                _start(settings)
    except Exception as error:
        _open.close()
        lack = exhausted(error)
        if address and not lack:
            raise ClusterError(
                f"the Ray cluster at {address} answers, but could not be joined ({first_line(error)})",
                remedy="run this on a machine of the cluster (`ray start --address=...` makes this one into one), with "
                "the cluster's versions of Python and Ray",
            ) from error
        raise ClusterError(
            f"a local Ray could not be started ({lack.message if lack else first_line(error)})",
            remedy=lack.remedy if lack else "free memory and /tmp space, then run again",
        ) from error
    except BaseException:
        _open.close()
        raise


def _start(settings: ClusterSettings) -> None:
    """Everything that Ray and its workers write to the disk lies in folders that are removed, now or by a later run."""
    import ray

    session = _open.enter_context(scratch.folder("ray", scratch.short_place()))
    _open.enter_context(scratch.everything_in(_open.enter_context(scratch.folder("run"))))
    for left in reversed(range(_STARTS)):
        others = guard.children(os.getpid())
        try:
            ray.init(
                address="local",
                num_cpus=settings.cpus or len(os.sched_getaffinity(0)),
                object_store_memory=settings.object_store_mb * 2**20,
                include_dashboard=settings.dashboard,
                log_to_driver=False,
                logging_level="CRITICAL",
                _temp_dir=str(session),
            )
            break
        except Exception as error:
            ray.shutdown()
            for pid in set(guard.children(os.getpid())) - set(others):
                os.kill(pid, signal.SIGKILL)
            if not left or "timed out" not in str(error).lower():
                raise
    for pid in guard.children(os.getpid()):
        if name := _NEEDED.get(Path(f"/proc/{pid}/comm").read_text().strip()):
            guard.watch(name, pid)


def _to_standard_error(data: dict[str, Any], *_: object, **__: object) -> None:
    """What Ray's processes tell the driver. Ray prints it to standard output, where results are printed."""
    os.write(2, "".join(f"{line}\n" for line in data["lines"]).encode(errors="replace"))


def disconnect() -> None:
    """Leave the cluster; a local one is stopped with all its processes."""
    import ray

    guard.unwatch()
    try:
        if ray.is_initialized():
            ray.shutdown()
    finally:
        _open.close()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts a handler of its own on SIGTERM, which ends the process in the middle of whatever it does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Channel:
    """Messages from tasks and training workers to whoever watches: small dicts, in order.

    They only show how far the work is: where they cannot be sent or received, the work goes on without them.
    """

    def __init__(self) -> None:
        import ray

        # A mailbox that dies, for want of memory for one, starts again, without what was in it.
        self._actor = ray.remote(num_cpus=0, max_restarts=-1)(_Mailbox).remote()

    def send(self, message: dict[str, Any]) -> None:
        """Does not wait: reporting progress must never hold up the work."""
        with suppress(Exception):
            self._actor.put.remote(message)

    def receive(self) -> list[dict[str, Any]]:
        """None while nobody answers: progress must never hold up the end of the work either."""
        import ray

        try:
            messages: list[dict[str, Any]] = ray.get(self._actor.take.remote(), timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return []
        return messages

    def close(self) -> None:
        import ray

        with suppress(Exception):
            ray.kill(self._actor)

    @contextmanager
    def watched(self, show: Callable[[dict[str, Any]], None], every: float = 0.5) -> Iterator[None]:
        """Calls `show` for every message that arrives while the body runs."""
        done = threading.Event()

        def show_all() -> None:
            for message in self.receive():
                with suppress(OSError):  # of a terminal that was closed
                    show(message)

        def watch() -> None:
            while not done.wait(every):
                show_all()

        thread = threading.Thread(target=watch, name="channel", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show_all()
            self.close()


class _Mailbox:
    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def put(self, message: dict[str, Any]) -> None:
        self._messages.append(message)

    def take(self) -> list[dict[str, Any]]:
        messages, self._messages = self._messages, []
        return messages


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of the end of the process, where no command sees to that (infra.guard)."""
    asked = threading.Event()
    if guard.in_charge() or threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's business
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)

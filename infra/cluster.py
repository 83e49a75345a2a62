"""The only file that starts or joins a Ray cluster, and the channel by which its workers report their progress.

On a laptop `connect()` starts a local Ray with limited memory for objects. By default Ray takes 30 % of the machine's
memory for them, but here there are few: image bytes go to the store, not through Ray.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from infra import guard, scratch
from infra.background import repeated
from infra.causes import exhausted, first_line
from infra.config import Settings, operational
from infra.errors import ClusterError
from infra.notices import Mailbox
from infra.ray_head import check_head, own_token


class ClusterSettings(Settings):
    address: str | None = operational(None, description="a Ray cluster to join; none: start one on this machine")
    cpus: int | None = operational(None, ge=1, description="CPUs of the local cluster; none: all of this machine's")
    object_store_mb: int = operational(256, ge=80, description="memory of the local cluster for Ray's own objects")
    dashboard: bool = operational(False, description="Ray's own page of the local cluster")


# Environment variables of Ray and its workers, unless the user has set them.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no calls home
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # how soon the end of a training run is noticed
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else every task that asks for no GPU warns about it
    "RAY_worker_niceness": "0",  # by default Ray's workers have low priority, but here they do the work
    # A training step frees and allocates large blocks again and again; returning them to the system costs 10 %.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 10**9),
}


# The same of a cluster that is started here. Nobody announces to it that its machine will be taken away, so no process
# of a training run need wait for that.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


# The processes that a local cluster cannot do without: name in the system -> name in messages.
_NEEDED = {
    "gcs_server": "the head process of Ray on this machine (gcs_server)",
    "raylet": "Ray's raylet on this machine",
}

_STARTS = 3  # attempts to start a local Ray, which gives up after half a minute if the machine is busy
_ANSWER_SECONDS = 5.0  # more than a mailbox on a busy machine needs

_open = ExitStack()  # the temporary folders of a local cluster, which exist as long as it does


def connect(settings: ClusterSettings | None = None) -> None:
    """Join the cluster, or start a local one. Does nothing if this process is connected."""
    import ray

    settings = settings or ClusterSettings()
    if ray.is_initialized():
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    for name, value in (_ENVIRONMENT | ({} if address else _LOCAL_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
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
    """Start a local Ray. What it and its workers write to disk is in folders that this run or a later one removes."""
    import ray

    session = _open.enter_context(scratch.folder("ray", scratch.short_place()))
    _open.enter_context(scratch.everything_in(_open.enter_context(scratch.folder("run"))))
    for attempts_left in reversed(range(_STARTS)):
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
            if not attempts_left or "timed out" not in str(error).lower():
                raise
    for pid in guard.children(os.getpid()):
        if name := _NEEDED.get(Path(f"/proc/{pid}/comm").read_text().strip()):
            guard.watch(name, pid)


def _to_standard_error(data: dict[str, Any], *_: object, **__: object) -> None:
    """Prints messages of Ray's processes. Ray would print them to standard output, which is for results."""
    os.write(2, "".join(f"{line}\n" for line in data["lines"]).encode(errors="replace"))


def started_here() -> bool:
    """Whether the cluster was started by this process, and ends with it."""
    import ray

    node = ray._private.worker._global_node
    return bool(node is not None and node.is_head())


def disconnect() -> None:
    """Leave the cluster; stop a local one with all its processes."""
    import ray

    guard.unwatch()
    try:
        if ray.is_initialized():
            ray.shutdown()
    finally:
        _open.close()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restores the handler of SIGTERM: Ray sets one that ends the process in the middle of its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Channel:
    """Carries small dicts from tasks and training workers to the driver, in order, and back its wish that they end.

    Work never depends on them: if they cannot be sent or received, it goes on without them.
    """

    def __init__(self) -> None:
        import ray

        # A mailbox that dies, for example for lack of memory, is restarted empty.
        self._actor = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox).remote()

    def send(self, message: dict[str, Any]) -> None:
        """Send without waiting: progress must not delay the work."""
        with suppress(Exception):
            self._actor.put.remote(message)

    def receive(self) -> list[dict[str, Any]]:
        """The new messages; none if the mailbox does not answer soon: progress must not delay the work."""
        import ray

        try:
            return cast(list[dict[str, Any]], ray.get(self._actor.take.remote(), timeout=_ANSWER_SECONDS))
        except ray.exceptions.RayError:
            return []

    def ask_to_end(self) -> None:
        """Called by the driver: the workers are to end as soon as nothing is lost by it."""
        with suppress(Exception):
            self._actor.ask_to_end.remote()

    def asked_to_end(self) -> bool:
        """Asked by workers; it waits for the answer for some seconds."""
        import ray

        try:
            return bool(ray.get(self._actor.asked_to_end.remote(), timeout=_ANSWER_SECONDS))
        except ray.exceptions.RayError:
            return False

    def close(self) -> None:
        import ray

        with suppress(Exception):
            ray.kill(self._actor)

    @contextmanager
    def watched(self, show: Callable[[dict[str, Any]], None], every: float = 0.5) -> Iterator[None]:
        """Calls `show` for every message that arrives while the body runs."""

        def show_all() -> None:
            for message in self.receive():
                with suppress(OSError):  # the terminal was closed
                    show(message)

        try:
            with repeated(show_all, every, "channel"):
                yield
        finally:
            show_all()
            self.close()


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process; never set where `infra.guard` handles signals."""
    received = threading.Event()
    if guard.in_charge() or threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can set handlers
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)

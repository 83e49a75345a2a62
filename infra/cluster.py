"""The only place that starts or joins a Ray cluster, and the line by which far-away work reports to the terminal.

On a laptop `connect()` starts a local Ray whose CPUs and memory are bounded on purpose: left alone, Ray takes 30 % of
the machine's memory for objects that this system never puts there (image bytes go to the store, not through Ray).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from infra.config import Settings, operational
from infra.errors import ClusterError
from infra.head import check_head, own_token


class ClusterSettings(Settings):
    address: str | None = operational(None, description="a Ray cluster to join; none: start one on this machine")
    cpus: int | None = operational(None, ge=1, description="CPUs of the local cluster; none: all of this machine's")
    object_store_mb: int = operational(256, ge=80)
    dashboard: bool = operational(False)


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


def connect(settings: ClusterSettings | None = None) -> None:
    """Join the cluster, or start a local one; a second call finds the first one's and does nothing."""
    import ray

    settings = settings or ClusterSettings()
    if ray.is_initialized():
        return
    for name, value in _LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        check_head(address)
    else:
        own_token()
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(
                address="local",
                num_cpus=settings.cpus or len(os.sched_getaffinity(0)),
                object_store_memory=settings.object_store_mb * 2**20,
                include_dashboard=settings.dashboard,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if address:
            raise ClusterError(
                f"the Ray cluster at {address} answers, but could not be joined ({error})",
                remedy="run this on a machine of the cluster (`ray start --address=...` makes this one into one), with "
                "the cluster's versions of Python and Ray",
            ) from error
        raise ClusterError(
            f"a local Ray could not be started ({error})", remedy="free memory and /tmp space, then run again"
        ) from error


def disconnect() -> None:
    """Leave the cluster; a local one is stopped with all its processes."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


class Channel:
    """Messages from tasks and training workers to whoever watches: small dicts, in order, none lost while it lives."""

    def __init__(self) -> None:
        import ray

        self._actor = ray.remote(num_cpus=0)(_Mailbox).remote()

    def send(self, message: dict[str, Any]) -> None:
        """Does not wait: reporting progress must never hold up the work."""
        self._actor.put.remote(message)

    def receive(self) -> list[dict[str, Any]]:
        import ray

        messages: list[dict[str, Any]] = ray.get(self._actor.take.remote())
        return messages

    def close(self) -> None:
        import ray

        ray.kill(self._actor)

    @contextmanager
    def watched(self, show: Callable[[dict[str, Any]], None], every: float = 0.5) -> Iterator[None]:
        """Calls `show` for every message that arrives while the body runs."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(every):
                for message in self.receive():
                    show(message)

        thread = threading.Thread(target=watch, name="channel", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            for message in self.receive():
                show(message)
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
    """An event that SIGTERM sets, in place of the end of the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's business
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)

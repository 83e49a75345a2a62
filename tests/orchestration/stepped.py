"""Drivers that go on from store call to store call, one at a time, as a script says; it also kills them and puts them
to sleep. So every order of the calls of several drivers can be tried, and each again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra.errors import NotFound
from infra.store import Entry, Store


class Killed(BaseException):
    """What a driver's store calls raise once the driver is dead, so that nothing it does on its way out counts."""


class Memory(Store):
    """A store in memory."""

    def __init__(self) -> None:
        self.url = "memory://"
        self.objects: dict[str, bytes] = {}

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if key not in self.objects:
            raise NotFound(f"there is no {key}", remedy="look elsewhere")
        return self.objects[key][start:end]

    def put(self, key: str, data: bytes | Path) -> None:
        self.objects[key] = data if isinstance(data, bytes) else data.read_bytes()

    def create(self, key: str, data: bytes | Path) -> bool:
        if key in self.objects:
            return False
        self.put(key, data)
        return True

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        return iter([Entry(key, len(self.objects[key]), 0.0) for key in sorted(self.objects) if key.startswith(prefix)])

    def size(self, key: str) -> int | None:
        return len(self.objects[key]) if key in self.objects else None

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def download(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key))

    def now(self) -> float:
        return 0.0


class Stepped(Store):
    """A driver's way to a store: it stops before each call until it may go on."""

    def __init__(self, store: Store, step: Callable[[], None]) -> None:
        self.url, self._store, self._step = store.url, store, step

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._do("get", key, start, end)

    def put(self, key: str, data: bytes | Path) -> None:
        self._do("put", key, data)

    def create(self, key: str, data: bytes | Path) -> bool:
        return self._do("create", key, data)

    def list_unchecked(self, prefix: str = "") -> Iterator[Entry]:
        return iter(self._do("_listed", prefix))

    def size(self, key: str) -> int | None:
        return self._do("size", key)

    def delete(self, key: str) -> None:
        self._do("delete", key)

    def download(self, key: str, path: Path) -> None:
        self._do("download", key, path)

    def now(self) -> float:
        return self._do("now")

    def _do(self, method: str, *arguments: Any) -> Any:
        self._step()
        if method == "_listed":
            return list(self._store.list_unchecked(*arguments))
        return getattr(self._store, method)(*arguments)


class Process:
    """Something that runs in a thread of its own, but only while `go` waits for its next step."""

    def __init__(self, work: Callable[[Process], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = self._killed = False
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._has_stopped.acquire()

    def go(self, steps: int = 1) -> None:
        for _ in range(steps):
            if self.ended:
                return
            self._may_go.release()
            self._has_stopped.acquire()

    def kill(self) -> None:
        self._killed = True
        while not self.ended:
            self.go()

    def step(self) -> None:
        """Called by the work: here it may be stopped for long, or for ever."""
        if not self._killed:
            self._has_stopped.release()
            self._may_go.acquire()
        if self._killed:
            raise Killed

    def _run(self) -> None:
        try:
            self.step()
            self.result = self._work(self)
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self.error = error
        self.ended = True
        self._has_stopped.release()

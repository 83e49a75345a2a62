"""One loop over Ray tasks: pieces of work that do not depend on each other, some of them under way at once.

    class Shards(Work[int, Made]):
        noun = "shards"

        def start(self, piece, again):          # a Ray task for a piece
            return make.remote(piece)

    for number, made in results(Shards(range(7), at_once=4)):
        ...

SIGTERM ends it between two results, and what is under way is given up: a piece is the same whenever it is done. One
whose process dies is started once more; the second death is told, with the piece's name. What a task raises is raised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Generator, Iterable
from typing import Any, Generic, TypeVar

from infra.causes import first_line
from infra.cluster import sigterm
from infra.errors import ClusterError, Stopped

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_WAIT = 0.5  # seconds after which SIGTERM is heeded at the latest
_GIVEN_UP = 10.0  # seconds for tasks to end that are given up


class Work(ABC, Generic[Piece, Result]):
    noun = "pieces"

    def __init__(self, pieces: Iterable[Piece], at_once: int | None = None) -> None:
        """`at_once`: None for twice the cluster's CPUs."""
        self.waiting = deque(pieces)
        self.left = len(self.waiting)  # pieces that are not done, those under way among them
        self.at_once = at_once or 0

    def begin(self) -> None:
        """What needs Ray and comes before the first piece: where nothing is left to do, nobody starts one."""
        import ray

        self.at_once = self.at_once or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))

    @abstractmethod
    def start(self, piece: Piece, again: bool) -> Any:
        """A Ray task; `again`: another one died of this piece."""

    def ready(self, running: Collection[Piece]) -> Iterable[Piece]:
        """The pieces to start now, beside those that are under way."""
        for _ in range(min(self.at_once - len(running), len(self.waiting))):
            yield self.waiting.popleft()

    def ended(self, piece: Piece, result: Result | None) -> None:
        """A task has ended, without a result if its process died."""
        self.left -= result is not None

    def name(self, piece: Piece) -> str:
        return f"{self.noun.removesuffix('s')} {piece}"

    def give_up(self, tasks: list[Any]) -> None:
        """All is over, and these are still under way."""
        import ray

        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=_GIVEN_UP)


def results(work: Work[Piece, Result]) -> Generator[tuple[Piece, Result], None, None]:
    """The pieces with what came of them as they get done, in no particular order."""
    import ray

    running: dict[Any, tuple[Piece, bool]] = {}
    work.begin()
    with sigterm() as stopped:
        try:
            while True:
                for piece in work.ready([piece for piece, _ in running.values()]):
                    running[work.start(piece, again=False)] = piece, False
                if not running:
                    return
                tasks, _ = ray.wait(list(running), timeout=_WAIT)
                if stopped.is_set():
                    raise Stopped(
                        f"stopped by SIGTERM with {work.left} {work.noun} left",
                        remedy="run the same command again; it goes on from there",
                    )
                for task in tasks:
                    piece, again = running.pop(task)
                    result = _result(task, work, piece, again)
                    work.ended(piece, result)
                    if result is None:
                        running[work.start(piece, again=True)] = piece, True
                    else:
                        yield piece, result
        finally:
            work.give_up(list(running))


def _result(task: Any, work: Work[Piece, Result], piece: Piece, again: bool) -> Result | None:
    """None if the process died, for the first time."""
    import ray
    from ray import exceptions

    died = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError)
    try:
        result: Result = ray.get(task)
    except exceptions.RayTaskError as error:
        raise error.cause from None
    except (*died, exceptions.OutOfMemoryError) as error:
        if again:
            raise ClusterError(
                f"{work.name(piece)} kills its worker, and did so before ({first_line(error)})",
                remedy="look for the out-of-memory killer in the node's log; have fewer workers at a time",
            ) from None
        return None
    return result

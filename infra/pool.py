"""A loop over Ray tasks: independent pieces of work, of which several run at once.

    class Shards(Work[int, ShardRecord]):
        noun = "shards"

        def start(self, piece, again):          # starts a Ray task for a piece
            return make.remote(piece)

    for number, record in results(Shards(range(7), at_once=4)):
        ...

SIGTERM ends the loop between two results, and running tasks are cancelled: a later run gets the same results for those
pieces. If a task's process dies, the piece is started once more; if that dies, too, an error names the piece. An error
that a task raises is raised here, unless the work has another use for it: see `Work.failed`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Generator, Iterable
from typing import Any, Generic, TypeVar, cast

from infra.causes import first_line
from infra.cluster import sigterm
from infra.errors import ClusterError, Stopped

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_WAIT = 0.5  # the most seconds until SIGTERM is noticed
_GIVEN_UP = 10.0  # the most seconds to wait for cancelled tasks


class Work(ABC, Generic[Piece, Result]):
    noun = "pieces"

    def __init__(self, pieces: Iterable[Piece], at_once: int | None = None) -> None:
        """`at_once`: how many pieces run at once; None for twice the cluster's CPUs."""
        self.waiting = deque(pieces)
        self.left = len(self.waiting)  # pieces that are not done, including running ones
        self.at_once = at_once or 0

    def begin(self) -> None:
        """Preparations that need Ray. Called before the first piece is started."""
        import ray

        self.at_once = self.at_once or max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))

    @abstractmethod
    def start(self, piece: Piece, again: bool) -> Any:
        """Start a Ray task for the piece; `again`: the process of its first task died."""

    def ready(self, running: Collection[Piece]) -> Iterable[Piece]:
        """The pieces to start now, beside the running ones."""
        for _ in range(min(self.at_once - len(running), len(self.waiting))):
            yield self.waiting.popleft()

    def ended(self, piece: Piece, result: Result | None) -> None:
        """Called when a task has ended; `result` is None if its process died."""
        self.left -= result is not None

    def failed(self, piece: Piece, error: Exception, again: bool) -> Result | None:
        """What takes the place of the result of a task that raised, or whose process died `again`.

        None: the piece is started again. Here, there is nothing instead: the error is raised.
        """
        raise error from None

    def name(self, piece: Piece) -> str:
        return f"{self.noun.removesuffix('s')} {piece}"

    def give_up(self, tasks: list[Any]) -> None:
        """Cancel the running tasks when the loop ends."""
        import ray

        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=_GIVEN_UP)


def results(work: Work[Piece, Result]) -> Generator[tuple[Piece, Result], None, None]:
    """The pieces with their results, in the order in which they are done."""
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
    """The task's result; None if the piece is to be started again, as its process died or the work asks for it."""
    import ray
    from ray import exceptions

    died = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError)
    try:
        return cast(Result, ray.get(task))
    except exceptions.RayTaskError as error:
        return work.failed(piece, error.cause, again)
    except (*died, exceptions.OutOfMemoryError) as error:
        if again:
            killed = ClusterError(
                f"{work.name(piece)} kills its worker, and did so before ({first_line(error)})",
                remedy="look for the out-of-memory killer in the node's log; have fewer workers at a time",
            )
            return work.failed(piece, killed, again)
        return None

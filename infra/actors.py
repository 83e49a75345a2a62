"""A pool of Ray actors, each of which keeps what it works with loaded: a network, above all.

    class Counter:                              # the actor
        def do(self, piece): ...                # is called with one piece after the other

    for piece, result in results(Actors("pages", pages, needs, Counter, book)): ...

An actor that dies is replaced, and its piece is given to the new one. Actors that nothing is left for are ended, as
other work may be waiting for what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from infra.config import Settings, operational
from infra.errors import ClusterError
from infra.pool import Piece, Result, Work


class Needs(NamedTuple):
    """How many actors there are, and what each of them asks Ray for."""

    workers: int | None = None  # None: as many as the cluster holds
    cpus: float = 1
    gpus: float | None = 0.0  # None: 1 where the cluster has GPUs


class PoolSettings(Settings):
    workers: int | None = operational(None, ge=1, description="none: as many as the cluster holds")
    cpus: int = operational(1, ge=1, description="of each worker: they decode while the network works")
    gpus: float | None = operational(
        None, ge=0, description="of each worker: 1, or a part of one; 0: CPUs alone; none: 1 where the cluster has GPUs"
    )

    @property
    def needs(self) -> Needs:
        return Needs(self.workers, self.cpus, self.gpus)


def fitted(needs: Needs) -> Needs:
    """As many workers as are asked for, but no more than fit into the cluster: another one would wait for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = needs.gpus if needs.gpus is not None else float(any(node.get("GPU") for node in nodes))
    asked = {kind: amount for kind, amount in (("CPU", needs.cpus), ("GPU", gpus)) if amount}
    if not asked:
        return Needs(needs.workers or 1, needs.cpus, gpus)
    fit = sum(min(int(node.get(kind, 0) // amount) for kind, amount in asked.items()) for node in nodes)
    if not fit:
        raise ClusterError(
            f"the cluster holds no worker of {needs.cpus:g} CPUs and {gpus:g} GPUs",
            remedy="set the stage's `cpus` and `gpus` to what one node has, or join a larger cluster",
        )
    return Needs(min(needs.workers or fit, fit), needs.cpus, gpus)


class Actors(Work[Piece, Result]):
    def __init__(
        self, noun: str, pieces: Iterable[Piece], needs: Needs, actor: Callable[..., Any], *arguments: Any
    ) -> None:
        """`needs` are fitted to the cluster; `actor(*arguments)` is made in each worker."""
        import ray

        super().__init__(pieces)
        self.noun, self.at_once = noun, min(needs.workers or 1, max(1, len(self.waiting)))
        remote = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus or 0, max_restarts=0)(actor)
        self._new_worker = partial(remote.remote, *arguments)
        self._idle = [self._new_worker() for _ in range(min(self.at_once, len(self.waiting)))]
        self._busy: dict[Piece, Any] = {}

    def ready(self, running: Collection[Piece]) -> Iterator[Piece]:
        yield from super().ready(running)
        while self._idle and not self.waiting:
            _kill(self._idle.pop())

    def start(self, piece: Piece, again: bool) -> Any:
        worker = self._busy[piece] = self._idle.pop() if self._idle and not again else self._new_worker()
        return worker.do.remote(*self.arguments(piece))

    def arguments(self, piece: Piece) -> tuple[Any, ...]:
        """What `do` is called with."""
        return (piece,)

    def replace(self, piece: Piece) -> None:
        """Have another actor in place of the one that the piece was given to, which may be dead."""
        _kill(self._busy[piece])
        self._busy[piece] = self._new_worker()

    def ended(self, piece: Piece, result: Result | None) -> None:
        super().ended(piece, result)
        worker = self._busy.pop(piece)
        if result is None:
            _kill(worker)
        else:
            self._idle.append(worker)

    def give_up(self, tasks: list[Any]) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            _kill(worker)


def _kill(worker: Any) -> None:
    import ray

    ray.kill(worker)

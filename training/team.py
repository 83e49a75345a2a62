"""Decisions that all ranks of a run must share, so that no two ranks act on different views of the store.

The store may change between two reads, as another driver may commit or delete a state. So rank 0 alone reads and
broadcasts the result, and what every rank does by itself is compared before anything is built on it. An error on one
rank is raised on all of them, so that no rank waits for one that has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import PixnerdError, TrainingError

T = TypeVar("T")
Ranges = Mapping[str, tuple[int, int]]  # parameter -> a range of its own flat vector


class Team:
    """The ranks of one training run; `torch.distributed` is up."""

    def __init__(self, group: Any = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Python objects go over gloo: NCCL needs each rank's GPU, which is not chosen yet, and waits for its stream.
        self._group: Any = group or (dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None)

    @classmethod
    def apart(cls) -> Team:
        """The same ranks with connections of their own, for use in another thread."""
        return cls(dist.new_group(backend="gloo"))

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Rank 0 alone calls `work`; every rank gets what it returned."""
        outcomes: list[Any] = [_outcome(work) if self.rank == 0 else None]
        dist.broadcast_object_list(outcomes, src=0, group=self._group)
        return cast(T, _result(outcomes[0]))

    def on_each_rank(self, work: Callable[[], T]) -> list[T]:
        """Every rank calls `work`; each gets what all of them returned, ordered by rank."""
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, _outcome(work), group=self._group)
        return [_result(outcome) for outcome in outcomes]

    def check_agreed(self, value: Any, what: str) -> None:
        """Raises unless the value is the same on every rank."""
        values = self.on_each_rank(lambda: value)
        if any(other != values[0] for other in values):
            raise TrainingError(
                f"the ranks do not agree on {what}: {', '.join(str(other) for other in values)}",
                remedy="run again: nothing of this was written",
            )

    def gathered(self, tensors: Mapping[str, Tensor], ranges: Ranges) -> dict[str, Tensor]:
        """Flat tensors in rank 0's host memory, put together from all ranks' ranges of them; the others get none."""
        everyones = self.on_each_rank(lambda: dict(ranges))
        if self.rank:
            for name in ranges:
                dist.send(tensors[name].cpu().contiguous(), dst=0, group=self._group)
            return {}
        sizes: dict[str, int] = {}
        for theirs in everyones:
            sizes |= {name: max(end, sizes.get(name, 0)) for name, (_, end) in theirs.items()}
        whole = {name: torch.empty(size) for name, size in sizes.items()}
        for rank, theirs in enumerate(everyones):
            for name, (start, end) in theirs.items():
                if rank:
                    dist.recv(whole[name][start:end], src=rank, group=self._group)
                else:
                    whole[name][start:end] = tensors[name]
        return whole


def _outcome(work: Callable[[], T]) -> tuple[T | None, PixnerdError | None]:
    """What `work` returned, or our error that it raised. Any other error ends this process, and so the whole group."""
    try:
        return work(), None
    except PixnerdError as error:
        return None, error


def _result(outcome: tuple[Any, PixnerdError | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value

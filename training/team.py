"""What the ranks of a run decide together, so that none of them acts upon something that another one saw otherwise.

The store may change between two questions: another driver commits a state, or deletes one. So rank 0 alone asks and
tells the others, and what every rank does for itself is compared before anything is built on it. An error on one rank
is raised on all of them: nobody waits for an answer that will not come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from infra.errors import PixnerdError, TrainingError

T = TypeVar("T")


class Team:
    """The ranks of one training run; `torch.distributed` is up."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Objects go over CPUs: with NCCL each would need a GPU that is not chosen yet, and wait for its stream.
        self._group: Any = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def decided(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone does it."""
        answer: list[Any] = [_tried(work) if self.rank == 0 else None]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        found: T = _result(answer[0])
        return found

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, by rank."""
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, _tried(work), group=self._group)
        return [_result(answer) for answer in answers]

    def check_agreed(self, value: Any, what: str) -> None:
        """Raises unless the value is the same on every rank."""
        values = self.each(lambda: value)
        if any(other != values[0] for other in values):
            raise TrainingError(
                f"the ranks do not agree on {what}: {', '.join(str(other) for other in values)}",
                remedy="run again: nothing of this was written",
            )


def _tried(work: Callable[[], T]) -> tuple[T | None, PixnerdError | None]:
    """Other errors than ours end the process, and with it its group."""
    try:
        return work(), None
    except PixnerdError as error:
        return None, error


def _result(answer: tuple[Any, PixnerdError | None]) -> Any:
    value, error = answer
    if error is not None:
        raise error
    return value

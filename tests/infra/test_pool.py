"""The loop over tasks: how many at once, what happens to one that dies, and what is left when all is over."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ClusterError, DataError
from infra.pool import Work, results


def square(number: int, folder: Path, deaths: int) -> int:
    """The first `deaths` calls with this number end their process."""
    died = len(list(folder.glob(f"{number}-*")))
    if died < deaths:
        (folder / f"{number}-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0:
        raise DataError(f"{number} has no root", remedy="none")
    return number * number


class Squares(Work[int, int]):
    noun = "squares"

    def __init__(self, numbers: list[int], at_once: int, folder: Path, deaths: dict[int, int] | None = None) -> None:
        import ray

        super().__init__(numbers, at_once)
        self.folder, self.deaths = folder, deaths or {}
        self.task = ray.remote(num_cpus=0.5, max_retries=0)(square)
        self.most = 0
        self.started: list[tuple[int, bool]] = []

    def ready(self, running: Collection[int]) -> Iterator[int]:
        chosen = list(super().ready(running))
        self.most = max(self.most, len(running) + len(chosen))
        return iter(chosen)

    def start(self, piece: int, again: bool) -> Any:
        self.started.append((piece, again))
        return self.task.remote(piece, self.folder, self.deaths.get(piece, 0))


@pytest.mark.usefixtures("ray_cluster")
def test_all_are_done_and_never_more_at_once(tmp_path: Path) -> None:
    work = Squares(list(range(9)), 3, tmp_path)
    assert sorted(results(work)) == [(number, number * number) for number in range(9)]
    assert (work.most, work.left) == (3, 0)


@pytest.mark.usefixtures("ray_cluster")
def test_a_piece_whose_process_dies_is_started_once_more_and_then_told(tmp_path: Path) -> None:
    work = Squares([1, 2, 3], 2, tmp_path, {2: 1})
    assert dict(results(work)) == {1: 1, 2: 4, 3: 9}
    assert [again for piece, again in work.started if piece == 2] == [False, True]
    with pytest.raises(ClusterError, match="square 5 kills its worker, and did so before"):
        list(results(Squares([5], 1, tmp_path, {5: 2})))


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_task_raises_is_raised_and_the_others_are_given_up(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(DataError, match="-4 has no root"):
        list(results(Squares([-4, 1, 2], 3, tmp_path)))
    assert signal.getsignal(signal.SIGTERM) is before

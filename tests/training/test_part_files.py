"""A rank's part of a state is written as safetensors reads it, and fetched once for all ranks of a machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from infra.errors import DataError
from training.part_files import HostCopies, Shared, fetch_once, part, write_tensors


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path):
    tensors = {
        "master/a": torch.randn(5_000_001),  # more than a slice
        "ema/a": torch.arange(7, dtype=torch.bfloat16),
        "none": torch.empty(0),
        "part": torch.randn(9)[2:5],
    }
    path = tmp_path / "state.safetensors"
    sha256 = write_tensors(path, tensors)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_copies_take_memory_once_and_do_not_follow_what_they_copied():
    copies, weights = HostCopies(), torch.ones(4)
    first = copies.take({"w": weights})["w"]
    weights.fill_(2)
    assert torch.equal(first, torch.ones(4))
    second = copies.take({"w": weights})["w"]
    assert torch.equal(second, weights)
    assert second.data_ptr() == first.data_ptr()
    assert copies.take({"w": torch.ones(6)})["w"].shape == (6,)


class Rank:
    """One of several threads that stand for ranks; what each says all of them get."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._said, self._barrier = rank, said, barrier

    def on_each_rank(self, work: Callable[[], Any]) -> list[Any]:
        self._said[self.rank] = work()
        self._barrier.wait()
        answers = list(self._said)
        self._barrier.wait()
        return answers


def fetched(tmp_path: Path, wanted: list[list[int]], fetch: Callable[[int, Path], None]) -> list[Shared]:
    barrier, said = threading.Barrier(len(wanted), timeout=30), [None] * len(wanted)

    def rank(number: int) -> Shared:
        folder = tmp_path / str(number)
        folder.mkdir()
        team: Any = Rank(number, said, barrier)
        return fetch_once(team, wanted[number], folder, fetch)

    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(rank, range(len(wanted))))


def test_ranks_of_a_machine_fetch_each_file_once_and_share_the_work(tmp_path: Path):
    by: dict[int, str] = {}

    def fetch(number: int, path: Path) -> None:
        assert number not in by, "it was fetched before"
        by[number] = threading.current_thread().name
        path.write_text(str(number))

    shared = fetched(tmp_path, [[0, 1], [0, 1], [1, 2, 3], [3]], fetch)
    assert {one.folder for one in shared} == {tmp_path / "0"}
    assert [one.problem for one in shared] == [""] * 4
    assert [part(shared[0].folder, number).read_text() for number in range(4)] == list("0123")
    assert len(set(by.values())) == 4


def test_a_damaged_file_is_told_to_all(tmp_path: Path):
    def fetch(number: int, path: Path) -> None:
        if number == 1:
            raise DataError("1 is damaged", remedy="")

    assert [one.problem for one in fetched(tmp_path, [[0], [1]], fetch)] == ["1 is damaged"] * 2

"""What a commit costs the steps beside it, and what ranks that resume read of the store.

One rank with one thread, AdamW and the EMA, and a store that takes 100 MB/s. Steps without a commit and with one under
way are compared in turn, commit by commit, so that a noisy machine disturbs both. Before that, four ranks resume from
states that one and four ranks wrote, and the bytes that they read are counted.

    python -m tests.bench.bench_state [--parameters 100] [--commits 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.store import FileStore
from tests.training.forks import together
from training import states
from training.ema import Ema, EmaSettings
from training.engine import Engine, import_deepspeed
from training.optim import OptimSettings
from training.team import Team

HOME = "training/run"
RATE = 100e6  # bytes a second
WIDTH, BATCH = 2048, 128
CHUNK = 2**20


class Throttled(FileStore):
    """Takes files at a rate, as over a network: a piece is read and passed on, and then nothing happens for a while."""

    def put(self, key: str, data: bytes | Path) -> None:
        began, sent = time.monotonic(), 0
        if isinstance(data, Path):
            with data.open("rb") as file:
                while piece := file.read(CHUNK):
                    sent += len(piece)
                    time.sleep(max(0.0, began + sent / RATE - time.monotonic()))
        super().put(key, data)


class Counted(FileStore):
    """Writes down how many bytes were read, from whatever process."""

    def download(self, key: str, path: Path) -> None:
        super().download(key, path)
        with (self.root.parent / "read").open("a") as file:
            file.write(f"{path.stat().st_size}\n")


class Layers(nn.Module):
    def __init__(self, parameters: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(max(1, round(parameters / WIDTH**2)))))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layers(x).square().mean(), None


class Training:
    def __init__(self, parameters: float) -> None:
        torch.manual_seed(0)
        self.engine = Engine(Layers(parameters), OptimSettings(lr=1e-4), micro_batch=BATCH)
        self.ema = Ema(self.engine.masters, EmaSettings())
        self.input, self.taken = torch.randn(BATCH, WIDTH), 0

    def step(self) -> float:
        """Its seconds."""
        began = time.perf_counter()
        self.engine.step([self.input], 1e-4)
        self.ema.update(self.engine.masters, self.taken)
        self.taken += 1
        return time.perf_counter() - began

    def saver(self, store: FileStore) -> states.Saver:
        return states.Saver(store, HOME, run="r", attempt="a", keep=1, keep_every=0, allowed=lambda: None)

    def begin(self, saver: states.Saver) -> float:
        """Seconds until training may go on."""
        began = time.perf_counter()
        facts = {"step": self.taken, "position": self.taken, "curve": [], "returns": []}
        saver.begin(states.collected(self.engine, self.ema), facts, lambda team, part: None, lambda: None)
        return time.perf_counter() - began


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def beside_a_commit(folder: Path, parameters: float, commits: int) -> None:
    training = Training(parameters)
    saver = training.saver(Throttled(folder / "store"))
    alone = [training.step() for _ in range(4)][2:]  # the first ones make the moments
    ratios, held, lasted, before, during = (list[float]() for _ in range(5))
    for _ in range(commits):
        held.append(training.begin(saver))
        began, beside = time.perf_counter(), []
        while (thread := saver._under_way) is not None and thread.is_alive():
            beside.append(training.step())
        lasted.append(time.perf_counter() - began)
        saver.wait()
        after = [training.step() for _ in beside]
        ratios.append(statistics.median(beside) / statistics.median([*alone, *after]))
        before, during, alone = [*before, *alone], [*during, *beside], after
    count = sum(master.numel() for master in training.engine.masters)
    size = f"{4 * 4 * count / 1e9:.2f} GB"  # master, two moments and average
    print(f"{count / 1e6:.0f} M parameters, a store at {RATE / 1e6:.0f} MB/s, {commits} commits of {size}")
    print(f"  a commit lasts {statistics.median(lasted):.1f} s; its copy in host memory {told(held, 1e3)} ms")
    print(f"  a step alone {told([*before, *alone], 1e3)} ms, beside a commit {told(during, 1e3)} ms")
    print(f"  ratio {told(ratios, 1, 3)}; at most 1.05 is asked for")


def told(values: list[float], unit: float, digits: int = 0) -> str:
    middle, low, high = statistics.median(values) * unit, min(values) * unit, max(values) * unit
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def read_by(ranks: int, writers: int, folder: Path) -> None:
    parameters = 2e7
    store = Counted(folder / "store")

    def write(rank: int) -> None:
        training = Training(parameters)
        training.step()
        saver = training.saver(store)
        training.begin(saver)
        saver.wait()

    def resume(rank: int) -> None:
        training = Training(parameters)
        assert states.resume(store, HOME, Team(), training.engine, training.ema, print) is not None

    assert together(writers, write) == [0] * writers
    size = sum(entry.size for entry in store.list(f"{HOME}/state/"))
    assert together(ranks, resume) == [0] * ranks
    read = sum(map(int, (folder / "read").read_text().split()))
    print(f"  {ranks} ranks from a state of {writers}: {read / 1e6:.0f} MB read, {read / size:.2f} times the state")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=100, help="in millions")
    parser.add_argument("--commits", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_deepspeed()
    print("bytes that resuming ranks read")
    for writers in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            read_by(4, writers, Path(folder))
    with tempfile.TemporaryDirectory() as folder, one_rank(Path(folder)), suppress(KeyboardInterrupt):
        beside_a_commit(Path(folder), options.parameters * 1e6, options.commits)


if __name__ == "__main__":
    main()

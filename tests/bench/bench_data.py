"""`prepare` side by side with img2dataset: the same photographs from the same loopback server, turn about.

Each side is one process with all its children (Ray's as well), and its CPU-seconds and wall seconds are those of the
whole: from the start of the interpreter to the end of the last child. The server's CPU counts for neither. Equal are
output size (a bucket has about as many pixels as a square), JPEG quality and chroma (img2dataset's is always 4:2:0),
rows a shard and workers; all else is as each side does it by default: img2dataset shrinks by area averaging, ours by
antialiased Lanczos.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare.plan import PrepareSettings
from infra.cluster import ClusterSettings, connect, disconnect
from infra.config import parse
from infra.store import FileStore

SIDES = THEIRS, OURS = "img2dataset", "ours"
FEW = 64  # images of a run that shows what starting costs
EVERY = 0.25  # seconds between two looks at the processes
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: what a side leaves behind becomes our child, so that its CPU is counted
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


# What both sides are given


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """The folder on a loopback server in a process of its own: its address and its process."""
    command = [sys.executable, "-m", "tests.data_prep.web", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout
        try:
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.stdin.close()


def write_list(path: Path, base: str, names: Sequence[str], items: int) -> None:
    """`items` URLs; where the folder holds fewer they come again, under other queries."""
    urls = [f"{base}{names[n % len(names)]}" + (f"?n={n}" if n >= len(names) else "") for n in range(items)]
    captions = [f"photograph number {n} of a folder, by somebody, somewhere" for n in range(items)]
    path.parent.mkdir()
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)


# The sides


def theirs(table: Path, out: Path, given: argparse.Namespace) -> list[str]:
    options = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": out / "images",
        "output_format": "webdataset",
        "image_size": given.size,
        "resize_mode": "center_crop",
        "encode_quality": given.quality,
        "processes_count": given.workers,
        "thread_count": given.threads,
        "number_sample_per_shard": given.rows,
    }
    return [str(given.img2dataset), "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]


def theirs_done(out: Path) -> int:
    return sum(json.loads(path.read_text())["successes"] for path in out.glob("images/*_stats.json"))


def ours(table: Path, out: Path, given: argparse.Namespace) -> list[str]:
    downloads = given.threads * given.workers
    plain = {
        "sources": [{"kind": "url_list", "name": "bench", "url": str(table.parent), "tables": [table.name]}],
        "sizes": [{"name": "buckets", "side": given.size} if given.buckets else given.size],
        "quality": given.quality,
        "subsampling": "420",
        "rows_per_shard": given.rows,
        "in_flight": given.workers,
        "fetch": {"allow_private": True, "at_once": downloads, "per_host": downloads, "ahead_mib": 64 * given.workers},
    }
    settings = out / "settings.json"
    settings.write_text(json.dumps(plain))
    return [sys.executable, "-m", "tests.bench.bench_data", "--ours", str(settings), "--workers", str(given.workers)]


def prepare_ours(settings: Path, workers: int) -> None:
    """What runs in our side's process."""
    from data_prep.prepare.job import prepare

    store = FileStore(settings.parent / "store")
    connect(ClusterSettings(cpus=workers))
    try:
        summary = prepare(store, parse(PrepareSettings, json.loads(settings.read_text())))
        time.sleep(2 * EVERY)  # a last look at the workers, on our side's account: see Watch
    finally:
        disconnect()
    (settings.parent / "summary.json").write_text(summary.model_dump_json())


def ours_done(out: Path) -> int:
    sizes = json.loads((out / "summary.json").read_text())["sizes"]
    return sum(size["accepted"] for size in sizes.values())


# Measuring


class Process(NamedTuple):
    pid: int
    parent: int
    cpu: float  # seconds, with those of children that it has waited for
    resident: int  # bytes


class Cost(NamedTuple):
    cpu: float
    wall: float
    largest: list[int]  # bytes of the largest process below the first one, at each look


def processes() -> Iterator[Process]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                cpu = sum(map(int, fields[11:15])) / TICK
                yield Process(int(entry.name), int(fields[1]), cpu, int(fields[21]) * PAGE)


class Watch(threading.Thread):
    """Looks at all descendants, to see how large they are, and for the CPU that the kernel would forget.

    What a process waits for is added to its own account, in the end to ours. Ray's raylet waits for none of its
    workers, so what they have used is only known from looks at them; the last look is at most EVERY seconds old when
    one ends, and they end idle.
    """

    def __init__(self, first: int, but: int) -> None:
        super().__init__()
        self.largest: list[int] = []
        self.forgotten: dict[int, float] = {}  # process -> its CPU-seconds
        self._first, self._but = first, but
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(EVERY):
            self._look()

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _look(self) -> None:
        children: dict[int, list[Process]] = {}
        for process in processes():
            children.setdefault(process.parent, []).append(process)
        todo, sizes = [(os.getpid(), False)], [0]
        while todo:
            parent, forgets = todo.pop()
            forgets = forgets or _waits_for_none(parent)
            for process in children.get(parent, []):
                if process.pid == self._but:
                    continue
                todo.append((process.pid, forgets))
                if process.pid != self._first:
                    sizes.append(process.resident)
                if forgets:
                    self.forgotten[process.pid] = max(process.cpu, self.forgotten.get(process.pid, 0.0))
        self.largest.append(max(sizes))


def _waits_for_none(pid: int) -> bool:
    """Whether a process ignores SIGCHLD: then the kernel adds its children's time to nobody's."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGCHLD - 1) & 1)
    return False


def measure(command: list[str], log: Path, server: int) -> Cost:
    """Run it to the end of its last descendant."""
    before, began = _cpu_of_children(), time.perf_counter()
    with log.open("w") as file:
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # it would ask the web for its newest version
        first = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    watch = Watch(first.pid, server)
    watch.start()
    try:
        status = first.wait()
        orphans = _reap(server)
    finally:
        watch.stop()
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{command} ended with {status}:\n{log.read_text()[-3000:]}")
    forgotten = sum(cpu for pid, cpu in watch.forgotten.items() if pid not in orphans)
    return Cost(_cpu_of_children() - before + forgotten, wall, watch.largest)


def _reap(server: int) -> set[int]:
    """Wait for the orphans that a side has left, so that their time is counted; what will not end is made to."""
    reaped: set[int] = set()
    patience = time.monotonic() + 10
    while orphans := {process.pid for process in processes() if process.parent == os.getpid()} - {server}:
        for pid in orphans:
            if time.monotonic() > patience:
                os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, os.WNOHANG)[0]:
                reaped.add(pid)
        time.sleep(0.02)
    return reaped


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def use_memory_once() -> None:
    """A virtual machine gets a page from its host when the page is first used, at many times the cost of using it.

    Whoever first writes much would pay that; the other side, and a machine that has been up for long, would not.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * PAGE
    with mmap.mmap(-1, free // 10 * 9) as block:
        for at in range(0, len(block), PAGE):
            block[at] = 1


# The comparison


class Bench:
    def __init__(self, given: argparse.Namespace, folder: Path, names: list[str], base: str, server: int) -> None:
        self._given, self._folder, self._server = given, folder, server
        self._names, self._base = names, base

    def run(self, side: str, items: int) -> Cost:
        """One side from nothing to the end; all items must have become images."""
        out = self._folder / side
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        table = out / "tables" / "list.parquet"
        write_list(table, self._base, self._names, items)
        command = ours(table, out, self._given) if side == OURS else theirs(table, out, self._given)
        cost = measure(command, self._folder / f"{side}.log", self._server)
        made = ours_done(out) if side == OURS else theirs_done(out)
        if made != items:
            raise SystemExit(f"{side} made {made} of {items}:\n{(self._folder / f'{side}.log').read_text()[-3000:]}")
        return cost


def show(starts: dict[str, Cost], costs: dict[str, list[Cost]], items: int) -> None:
    print(f"{'':36}" + "".join(f"{side:>24}" for side in SIDES) + f"{'ours / theirs':>24}")
    whole = {side: [(items / cost.cpu, items / cost.wall) for cost in found] for side, found in costs.items()}
    further = {
        side: [((items - FEW) / (cost.cpu - start.cpu), (items - FEW) / (cost.wall - start.wall)) for cost in found]
        for (side, found), start in zip(costs.items(), starts.values(), strict=True)
    }
    for place, unit in enumerate(("CPU-second", "wall second")):
        for label, speeds in (("", whole), (", start-up apart", further)):
            one, two = ([speed[place] for speed in speeds[side]] for side in SIDES)
            ratios = [mine / other for other, mine in zip(one, two, strict=True)]
            print(f"{f'images a {unit}{label}':36}{_span(one):>24}{_span(two):>24}{_span(ratios, 2):>24}")
    for label, worth in (("CPU-seconds", 0), ("wall seconds", 1)):
        line = "".join(f"{(starts[side].cpu, starts[side].wall)[worth]:>24.1f}" for side in SIDES)
        print(f"{f'{label} for {FEW} images':36}{line}")
    for label, value in (("peak", max), ("median, first third", _first), ("median, last third", _last)):
        line = "".join(f"{max(value(cost.largest) for cost in costs[side]) / 2**20:>20.0f} MiB" for side in SIDES)
        print(f"{f'largest process, {label}':36}{line}")


def _first(sizes: list[int]) -> float:
    return statistics.median(sizes[: max(1, len(sizes) // 3)])


def _last(sizes: list[int]) -> float:
    return statistics.median(sizes[-max(1, len(sizes) // 3) :])


def _span(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, help="a folder of photographs")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--buckets", action="store_true", help="ours makes buckets of as many pixels, theirs squares")
    parser.add_argument("--quality", type=int, default=95)
    parser.add_argument("--rows", type=int, default=1000, help="of a shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=64, help="downloads at once, in a worker")
    parser.add_argument("--img2dataset", type=Path, default=Path("build/img2dataset/bin/python"), help="its Python")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # what our side's process is given
    given = parser.parse_args()
    if given.ours:
        prepare_ours(given.ours, given.workers)
        return
    if given.photos is None:
        parser.error("name a folder of photographs: make bench-data ARGS='--photos FOLDER'")
    names = sorted(str(path.relative_to(given.photos)) for path in given.photos.rglob("*") if path.is_file())
    if not names:
        parser.error(f"there are no files in {given.photos}")
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    print(
        f"{given.items} items from {len(names)} files{', asked for again and again' * (given.items > len(names))}; ",
        end="",
    )
    size = f"{given.size} px{' in buckets' * given.buckets}"
    print(f"{size}, JPEG {given.quality} 4:2:0, {given.workers} workers, {given.rows} rows a shard")
    use_memory_once()
    with TemporaryDirectory(prefix="bench-data-") as scratch, served(given.photos) as (base, server):
        bench = Bench(given, Path(scratch), names, base, server)
        starts = {side: bench.run(side, FEW) for side in SIDES}
        costs: dict[str, list[Cost]] = {side: [] for side in SIDES}
        for number in range(given.rounds):
            for side in SIDES:
                cost = bench.run(side, given.items)
                costs[side].append(cost)
                load = os.getloadavg()[0]
                print(f"round {number + 1}, {side}: {cost.cpu:.1f} CPU-s, {cost.wall:.1f} s; load average {load:.1f}")
    show(starts, costs, given.items)


if __name__ == "__main__":
    main()

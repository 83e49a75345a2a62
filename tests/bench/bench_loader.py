"""Images a second that a rank's loader delivers on one core, and its first batch, against other loaders.

The images are noise smoothed to the weight of photographs. Ours also checks hashes, tokenises, and draws times, drops
and the bits of noise; the others are measured without and with noise beside them. Rounds of all sides alternate. As
others may use the machine, the rates that count are those per second of CPU. What is not done here is to pin memory and
to copy to a GPU.

    python -m tests.bench.bench_loader [--images 2000] [--rounds 5] [--sizes 256,512]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from tests.bench.loaders import BATCH, Corpus, Loader, opened, ours, peers, with_noise
from training.diffusion.draws import draw, normal

PLACES = (0.0, 0.5, 0.9)  # of an epoch


class Taken(NamedTuple):
    """A run of a loader: seconds until its first batch, and images a second from there to its last."""

    first: float
    wall: float
    cpu: float


def run(loader: Loader, start: int, images: int) -> Taken:
    """What is read ahead before the first batch makes up for what is read ahead behind the last."""
    began, count = time.perf_counter(), 0
    with closing(loader(start)) as stream:
        next(stream)
        wall, cpu = time.perf_counter(), time.process_time()
        first = wall - began
        for delivered, _ in islice(stream, images // BATCH - 1):
            count += len(delivered)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert count + BATCH == images or images == BATCH, f"{count} of {images} images came"
    return Taken(first, count / wall, count / cpu)


def measure(size: int, images: int, rounds: int, folder: Path) -> None:
    corpus = Corpus(folder, images, size)
    print(f"{size} px: {images} images of {corpus.kilobytes:.0f} kB")
    reader = opened(corpus, folder / "cache")
    for tar in reader.selection.tars:
        reader.tars.begin(tar).result()
    others = peers(corpus)
    noisy = {f"{name}, with noise": partial(with_noise, loader) for name, loader in others.items()}
    mine: dict[str, Loader] = {"ours": partial(ours, reader)}
    show_rates(corpus, mine | others | noisy, rounds)
    show_places(corpus, mine | others, rounds)
    reader.close()
    show_empty_cache(corpus, folder, rounds)
    show_noise(size, rounds)


def in_turn(sides: Mapping[str, Callable[[], Taken]], rounds: int) -> dict[str, list[Taken]]:
    """Each round of each side; one more, before them, warms up."""
    taken: dict[str, list[Taken]] = defaultdict(list)
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            result = side()
            if round_:
                taken[name].append(result)
    return taken


def show_rates(corpus: Corpus, loaders: dict[str, Loader], rounds: int) -> None:
    """Over an epoch's first half."""
    images = corpus.images // 2 // BATCH * BATCH
    sides = {name: partial(run, loader, 0, images) for name, loader in loaders.items()}
    taken = in_turn(sides, rounds)
    for name, runs in taken.items():
        cpu, wall = [each.cpu for each in runs], [each.wall for each in runs]
        ratios = [own.cpu / other.cpu for own, other in zip(taken["ours"], runs, strict=True)]
        print(
            f"  {name:22} {statistics.median(cpu):6.0f} img per CPU second {spread(cpu)}, in wall time "
            f"{statistics.median(wall):5.0f} {spread(wall)}; ours / it "
            f"{statistics.median(ratios):.2f} {spread(ratios, 2)}"
        )


def show_places(corpus: Corpus, loaders: dict[str, Loader], rounds: int) -> None:
    """From the call to the first batch, and a few batches from there; the files of all are in the page cache."""
    images = max(2, corpus.images // 20 // BATCH) * BATCH
    for place in PLACES:
        start = int(place * corpus.images) // BATCH * BATCH
        for name, runs in in_turn({n: partial(run, ld, start, images) for n, ld in loaders.items()}, rounds).items():
            first, cpu = [each.first * 1e3 for each in runs], [each.cpu for each in runs]
            print(
                f"  {name:22} from {place:4.0%}: first batch {statistics.median(first):7.1f} ms {spread(first)}, "
                f"then {statistics.median(cpu):5.0f} img per CPU second {spread(cpu)}"
            )


def show_empty_cache(corpus: Corpus, folder: Path, rounds: int) -> None:
    """Ours from an opened selection and an empty cache: the first batch is read by range."""
    for place in PLACES:
        times = []
        for round_ in range(rounds):
            reader = opened(corpus, folder / f"empty-{place}-{round_}")
            times.append(run(partial(ours, reader), int(place * corpus.images), BATCH).first * 1e3)
            reader.close()
        name = "ours, an empty cache"
        print(f"  {name:22} from {place:4.0%}: first batch {statistics.median(times):7.1f} ms {spread(times)}")


def show_noise(size: int, rounds: int) -> None:
    """The parts of a sample's noise: bits ahead of the step, and the noise itself, which a GPU would make of them."""
    shape, bits, noise = (3, size, size), [], []
    for position in range(4 * rounds):
        began = time.process_time()
        drawn = draw(0, [position], shape)
        middle = time.process_time()
        normal(drawn.bits_BN, shape)
        bits.append((middle - began) * 1e3)
        noise.append((time.process_time() - middle) * 1e3)
    both = " and ".join(f"{statistics.median(part):.2f} ms {spread(part, 2)}" for part in (bits, noise))
    print(f"  an image's bits and its noise: {both} of CPU")


def spread(values: Sequence[float], digits: int = 0) -> str:
    return f"[{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="256,512")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, for all threads together
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            measure(size, options.images, options.rounds, Path(folder))


if __name__ == "__main__":
    main()

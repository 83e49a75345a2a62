"""Pictures drawn and judged per second, in batches against one by one.

drawn: the network of a checkpoint, 16 steps with guidance; without `--checkpoint`, the demo's size with random weights.
detected: GenEval's Mask2Former; without `--weights` it is a random one, far smaller than the published.

`python -m tests.bench.bench_questions` does the same for DPG-Bench's questions; `make bench-eval` runs both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pipelines.evaluation.detector.mask2former import Mask2Former
from tests.bench.sides import compare, show
from tests.pipelines import small_detector
from tests.training import small_checkpoint
from training.sampling import Artist, defaults, resolved


def drawing(folder: Path, device: str, count: int, rounds: int) -> None:
    settings = resolved(folder, defaults(folder, {"steps": 16, "guidance": 2.0, "batch": count}))
    artist = Artist.load(folder, device, settings)
    subjects: list[str | int] = [f"a red circle {number}" if artist.text else number for number in range(count)]
    seeds = [0] * count
    sides = {
        "one by one": lambda: [
            artist.batch([subject], [seed], settings) for subject, seed in zip(subjects, seeds, strict=True)
        ],
        "batched": lambda: artist.batch(subjects, seeds, settings),
    }
    print(f"drawn: {count} pictures of {settings.size}, {settings.steps} steps, {device}")
    report(compare(sides, rounds), count)


def detecting(weights: Path, device: str, count: int, size: int, rounds: int) -> None:
    detector = Mask2Former(weights, device)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)]
    sides = {
        "one by one": lambda: [detector.detect([picture]) for picture in pictures],
        "batched": lambda: detector.detect(pictures),
    }
    print(f"detected: {count} pictures of {size} px, {device}")
    report(compare(sides, rounds), count)


def report(times: dict[str, list[float]], count: int) -> None:
    show(times, ("one by one",))
    for name, found in times.items():
        rates = sorted(count / seconds for seconds in found)
        print(f"{name}: {rates[len(rates) // 2]:.2f} pictures a second [{rates[0]:.2f}, {rates[-1]:.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's folder")
    parser.add_argument("--weights", type=Path, help="mmdetection's checkpoint of Mask2Former")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures that are looked at")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with TemporaryDirectory() as name:
        folder = given.checkpoint or small_checkpoint.write_text(Path(name) / "net", image_size=32, hidden=96, blocks=6)
        drawing(folder, given.device, given.count, given.rounds)
        weights = given.weights or small_detector.write(Path(name) / "small.pth")
        detecting(weights, given.device, max(given.count // 4, 2), given.size, given.rounds)


if __name__ == "__main__":
    main()

"""How many images a second a scorer takes at several batch sizes, side by side with batch 1.

CLIP: ViT-B-32 of open_clip with random weights, one caption and two heads an image; decoding and resizing included.
Weights do not change the time, so none are downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import simplejpeg
import torch

from data_prep.scorers import Sample
from data_prep.scorers.clip import ClipScorer
from data_prep.scorers.settings import ClipSettings
from infra.config import parse
from tests.bench.sides import compare, show


def build(folder: Path, name: str) -> int:
    """The model as a local folder; the width of its features."""
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config(name)
    assert config is not None
    model = open_clip.create_model(name)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return int(config["embed_dim"])


def pictures(count: int, size: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    caption = [{"kind": "caption", "text": "a photograph of a street at night with two people and a yellow taxi"}]
    found = []
    for number in range(count):
        coarse = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        pixels = np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1))
        found.append(Sample(f"{number:020d}", caption, simplejpeg.encode_jpeg(pixels, 95)))
    return found


def side(scorer: ClipScorer, samples: list[Sample], cpu: list[float]) -> Callable[[], object]:
    """One pass over the samples, which also notes its CPU-seconds: on a busy machine they are the steadier measure."""

    def run() -> None:
        began = time.process_time()
        deque(scorer.rows(samples), maxlen=0)
        cpu.append(time.process_time() - began)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--images", type=int, default=32, help="in each round")
    parser.add_argument("--size", type=int, default=256, help="side of the prepared images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    samples = pictures(given.images, given.size)
    with TemporaryDirectory() as name:
        width = build(Path(name), given.model)
        torch.save({"weight": torch.randn(1, width)}, Path(name, "head.pth"))
        heads = [{"name": head, "file": str(Path(name, "head.pth"))} for head in ("aesthetic", "nsfw")]
        sides = {}
        cpu: dict[str, list[float]] = {f"batch {batch}": [] for batch in given.batches}
        for batch, (label, seconds) in zip(given.batches, cpu.items(), strict=True):
            plain = {"model": name, "heads": heads, "batch_size": batch, "dtype": given.dtype}
            sides[label] = side(ClipScorer(parse(ClipSettings, plain), given.device, given.threads), samples, seconds)
        times = compare(sides, given.rounds)
    print(f"{given.model}, {given.dtype}, {given.device}, {given.threads} threads, images of {given.size} px")
    show(times, (f"batch {given.batches[0]}",))
    for label, seconds in times.items():
        busy = cpu[label][-len(seconds) :]  # without the warm-up
        print(f"{label}: {_speed(given.images, seconds)} images/s, {_speed(given.images, busy)} a CPU-second")


def _speed(images: int, seconds: list[float]) -> str:
    speeds = [images / value for value in seconds]
    return f"{statistics.median(speeds):.1f} [{min(speeds):.1f}, {max(speeds):.1f}]"


if __name__ == "__main__":
    main()

"""How many images a second a scorer takes at several batch sizes, side by side with batch 1.

clip: ViT-B-32 of open_clip with random weights, one caption and two heads an image. Weights do not change the time, so
none are downloaded.
vlm: captions of up to `--tokens` tokens by a Qwen3-VL; without `--model` the tests' small random one, which shows what
batching does and nothing of a real model's speed.

Decoding and resizing are included.
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

from data_prep.scores import Sample, Scorer
from data_prep.scores.clip import ClipScorer
from data_prep.scores.settings import ClipSettings, VlmSettings
from data_prep.scores.vlm import VlmScorer
from infra.config import parse
from tests.bench.sides import compare, show
from tests.data_prep.small_scorers import build_vlm


def clip(folder: Path, given: argparse.Namespace, batch: int) -> ClipScorer:
    name, where = given.model or "ViT-B-32", folder / "clip"
    if not where.exists():
        width = build_clip(where, name)
        torch.save({"weight": torch.randn(1, width)}, folder / "head.pth")
    heads = [{"name": head, "file": str(folder / "head.pth")} for head in ("aesthetic", "nsfw")]
    plain = {"model": str(where), "heads": heads, "batch_size": batch, "dtype": given.dtype}
    return ClipScorer(parse(ClipSettings, plain), given.device, given.threads)


def vlm(folder: Path, given: argparse.Namespace, batch: int) -> VlmScorer:
    where = folder / "vlm"
    if not given.model and not where.exists():
        build_vlm(where, "qwen3")
    asks = [{"kind": "recaption", "prompt": "Describe.", "max_tokens": given.tokens}]
    plain = {"kind": "vlm", "model": given.model or str(where), "asks": asks, "batch_size": batch, "dtype": given.dtype}
    return VlmScorer(parse(VlmSettings, plain), given.device, given.threads)


SCORERS: dict[str, Callable[[Path, argparse.Namespace, int], Scorer]] = {"clip": clip, "vlm": vlm}


def build_clip(folder: Path, name: str) -> int:
    """The model as a local folder; the width of its features."""
    folder.mkdir()
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


def side(scorer: Scorer, samples: list[Sample], cpu: list[float]) -> Callable[[], object]:
    """One pass over the samples, which also notes its CPU-seconds: on a busy machine they are the steadier measure."""

    def run() -> None:
        began = time.process_time()
        deque(scorer.rows(samples), maxlen=0)
        cpu.append(time.process_time() - began)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default="clip", choices=SCORERS)
    parser.add_argument("--model", help="clip: a name of open_clip's; vlm: a folder or a hub model")
    parser.add_argument("--tokens", type=int, default=64, help="of a caption, at most")
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
        sides = {}
        cpu: dict[str, list[float]] = {f"batch {batch}": [] for batch in given.batches}
        for batch, (label, seconds) in zip(given.batches, cpu.items(), strict=True):
            sides[label] = side(SCORERS[given.what](Path(name), given, batch), samples, seconds)
        times = compare(sides, given.rounds)
    model = given.model or "by default"
    print(f"{given.what} {model}, {given.dtype}, {given.device}, {given.threads} threads, images of {given.size} px")
    show(times, (f"batch {given.batches[0]}",))
    for label, seconds in times.items():
        busy = cpu[label][-len(seconds) :]  # without the warm-up
        print(f"{label}: {_speed(given.images, seconds)} images/s, {_speed(given.images, busy)} a CPU-second")


def _speed(images: int, seconds: list[float]) -> str:
    speeds = [images / value for value in seconds]
    return f"{statistics.median(speeds):.1f} [{min(speeds):.1f}, {max(speeds):.1f}]"


if __name__ == "__main__":
    main()

"""Images that lie in a tar already, to squares: `prepare`'s worker beside plain loops around webdataset.

The loops read with webdataset, cut out the middle, shrink it by Lanczos, encode it, and write with webdataset: one with
Pillow, one with simplejpeg and torch's resize, which has its AVX2 code from Pillow-SIMD. They keep no record of what
they do: no hashes, no index, no rejections. All run in this process on one thread, in turn; counted is CPU time.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image

from data_prep.images.decode import decoder_versions
from data_prep.prepare.plan import PrepareSettings, make_plan
from data_prep.prepare.shard import make_shard, plain_outcomes
from infra.config import parse
from infra.store import open_store
from tests.data_prep import zoo

OURS = "prepare's worker"
SHAPES = [(768, 1024), (750, 500), (800, 1200), (1067, 1600)]  # of the pictures that are made up: height and width


def write_tar(photos: list[Path], count: int, path: Path) -> None:
    made = (
        [] if photos else [zoo.saved(zoo.photograph(n, *shape), "JPEG", quality=90) for n, shape in enumerate(SHAPES)]
    )
    with webdataset.TarWriter(str(path)) as tar:
        for number in range(count):
            data = photos[number % len(photos)].read_bytes() if photos else made[number % len(made)]
            tar.write({"__key__": f"{number:06d}", "jpg": data, "txt": f"photograph number {number}"})


def ours(tar: Path, out: Path, size: int, quality: int) -> int:
    source = {"kind": "webdataset", "name": "bench", "url": str(tar.parent)}
    plain = {"sources": [source], "sizes": [size], "quality": quality, "subsampling": "420"}
    settings = parse(PrepareSettings, plain)
    store = open_store(str(out))
    plan = make_plan(store, settings)
    outcomes = partial(plain_outcomes, settings=settings)
    return sum(
        record.accepted for shard in plan.shards for record in make_shard(store, settings, plan, shard, None, outcomes)
    )


def by_pillow(data: bytes, size: int, quality: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, side = middle(*image.size)
    small = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def by_torch(data: bytes, size: int, quality: int) -> bytes:
    pixels = simplejpeg.decode_jpeg(data, "RGB")
    left, top, side = middle(pixels.shape[1], pixels.shape[0])
    part = torch.from_numpy(pixels[top : top + side, left : left + side])[None].permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(part, (size, size), mode="lanczos", antialias=True)
    made: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(small[0].permute(1, 2, 0).numpy()), quality, colorsubsampling="420"
    )
    return made


def middle(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def plainly(way: Callable[[bytes, int, int], bytes], tar: Path, out: Path, size: int, quality: int) -> int:
    count = 0
    out.mkdir()
    with webdataset.TarWriter(str(out / "00000.tar")) as written:
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            small = way(sample["jpg"], size, quality)
            written.write({"__key__": sample["__key__"], "jpg": small, "txt": sample["txt"].decode()})
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs; without, pictures are made up")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--quality", type=int, default=95)
    given = parser.parse_args()
    torch.set_num_threads(1)
    photos = sorted(path for path in given.photos.rglob("*") if path.is_file()) if given.photos else []
    photos = photos[:: max(1, len(photos) // given.items)]
    sides: dict[str, Callable[[Path, Path, int, int], int]] = {
        OURS: ours,
        "webdataset, Pillow": partial(plainly, by_pillow),
        "webdataset, simplejpeg and torch": partial(plainly, by_torch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with TemporaryDirectory(prefix="bench-stored-") as scratch:
        tar = Path(scratch, "tars", "00000.tar")
        tar.parent.mkdir()
        write_tar(photos, given.items, tar)
        for number in range(given.rounds + 1):
            for place, (name, side) in enumerate(sides.items()):
                began = time.process_time()
                made = side(tar, Path(scratch, f"{number}-{place}"), given.size, given.quality)
                assert made == given.items, f"{name} made {made} of {given.items}"
                if number:  # the first warms up
                    seconds[name].append(time.process_time() - began)
    kind = "photographs" if photos else "made-up pictures"
    print(f"{given.items} {kind} in a tar to {given.size} px; {decoder_versions()}")
    for name, found in seconds.items():
        speeds = [given.items / value for value in found]
        ratios = [other / mine for other, mine in zip(found, seconds[OURS], strict=True)]
        print(f"{name:34} images a CPU-second {_span(speeds, 0):20} ours to it {_span(ratios, 2)}")


def _span(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()

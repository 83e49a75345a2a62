"""Images a second that a rank's loader delivers on one core, against webdataset on the same shards; first batch times.

The images are noise smoothed to the weight of photographs. Both sides decode with simplejpeg and hand over uint8
batches with a caption each; ours also checks hashes, tokenises, and draws noise, times and drops. What it does not do
here is pin memory and copy to a GPU: this runs on the CPU. Rounds of both sides alternate.

    python -m tests.bench.bench_loader [--images 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
import webdataset

from infra.records import DataObject, put_data
from infra.shards import SELECTION_SCHEMA, TarWriter, parquet_bytes
from infra.store import Store, open_store
from training.diffusion.draws import draw, normal
from training.encoders.text import Tokens
from training.loader.batches import Batches
from training.loader.cache import Folder, Tars
from training.loader.order import DataSettings
from training.loader.reader import Reader
from training.loader.selection import Selection

BATCH, SHARDS, TOKENS = 32, 4, 128
WORDS = ["a", "photograph", "of", "an", "old", "wooden", "boat", "on", "calm", "water", "and", "hills", "behind"]


def picture(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG with about the bytes of a photograph of its size."""
    coarse = torch.from_numpy(rng.normal(128, 50, (1, 3, size // 16, size // 16)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0].permute(1, 2, 0).numpy()
    grain = rng.normal(0, 9, (size, size, 3))
    return simplejpeg.encode_jpeg(np.clip(smooth + grain, 0, 255).astype(np.uint8), quality=92)


def write(store: Store, images: int, size: int) -> DataObject:
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [] for name in SELECTION_SCHEMA.names}
    pictures = [picture(rng, size) for _ in range(64)]
    for shard in range(SHARDS):
        packed = io.BytesIO()
        tar, rows = TarWriter(packed), range(shard * images // SHARDS, (shard + 1) * images // SHARDS)
        members = []
        for row in rows:
            caption = " ".join(rng.choice(WORDS, 60))
            members.append((row, tar.add(f"{row:08d}.jpg", pictures[row % 64]), caption))
            tar.add(f"{row:08d}.txt", caption.encode())
        tar.finish()
        key = put_data(store, "t", f"{shard}.tar", packed.getvalue()).key
        for row, member, caption in members:
            values = (f"{row:08d}", key, *member, size, size, [caption] * 3, [1 / 3] * 3, "source", "bucket")
            for name, value in zip(SELECTION_SCHEMA.names, values, strict=True):
                columns[name].append(value)
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in SELECTION_SCHEMA}, schema=SELECTION_SCHEMA)
    print(f"{size} px: {images} images of {np.mean([len(p) for p in pictures]) / 1e3:.0f} kB")
    return put_data(store, "selections", "selection.parquet", parquet_bytes(table))


def words_as_tokens(captions: Sequence[str]) -> Tokens:
    """A stand-in for a tokenizer, which would have to be downloaded."""
    ids_BT = torch.zeros(len(captions), TOKENS, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = [hash(word) & 0xFFFF for word in caption.split()[:TOKENS]]
        ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    cut = [len(caption.split()) > TOKENS for caption in captions]
    return Tokens(ids_BT, (ids_BT != 0).long(), torch.tensor(cut))


def opened(store: Store, selection: DataObject, cache: Path) -> Reader:
    folder = Folder(cache, 100)
    return Reader(Selection.open(store, selection, folder), Tars(store, folder), 0)


def batches_of(reader: Reader) -> Batches:
    settings = DataSettings(lanes=8, threads=1)
    return Batches(reader, settings, batch=BATCH, draw=partial(draw, 0), tokenize=words_as_tokens)


def ours(reader: Reader, count: int) -> None:
    with closing(batches_of(reader).iterate(0)) as stream:
        for _ in islice(stream, count // BATCH):
            pass


def theirs(tars: list[str], count: int) -> None:
    """The same tars, shuffled in a buffer as large as its documentation's, in one process."""

    def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        return simplejpeg.decode_jpeg(sample["jpg"], colorspace="RGB"), sample["txt"].decode()

    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).map(decoded).batched(BATCH)
    for images, _ in islice(dataset, count // BATCH):
        torch.from_numpy(np.stack(list(images)))


def theirs_with_draws(tars: list[str], count: int) -> None:
    """With the noise that a step needs, as training code draws it beside such a loader."""

    def decoded(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        return simplejpeg.decode_jpeg(sample["jpg"], colorspace="RGB"), sample["txt"].decode()

    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).map(decoded).batched(BATCH)
    for images, _ in islice(dataset, count // BATCH):
        torch.randn(torch.from_numpy(np.stack(list(images))).shape)


def first_batches(store: Store, selection: DataObject, folder: Path, rounds: int) -> None:
    """From an opened selection and an empty cache to the first batch, at several places of an epoch."""
    for share in (0.0, 0.5, 0.9):
        times = []
        for round_ in range(rounds):
            reader = opened(store, selection, folder / f"cold-{share}-{round_}")
            batches = batches_of(reader)
            position = int(share * batches.order.epoch_length) // BATCH * BATCH
            began = time.perf_counter()
            with closing(batches.iterate(position)) as stream:
                next(stream)
                times.append(time.perf_counter() - began)
            reader.close()
        print(f"  first batch at {share:4.0%}      {statistics.median(times) * 1e3:7.1f} ms {spread(times, 1e3)}")


def spread(values: list[float], scale: float = 1.0) -> str:
    return f"[{min(values) * scale:.1f}, {max(values) * scale:.1f}]"


def measure(size: int, images: int, rounds: int, folder: Path) -> None:
    store = open_store(str(folder / "store"))
    selection = write(store, images, size)
    reader = opened(store, selection, folder / "cache")
    for tar in reader.selection.tars:
        reader.tars.begin(tar).result()
    tars = [str(folder / "store" / tar) for tar in reader.selection.tars]
    assert all(tarfile.is_tarfile(tar) for tar in tars)
    sides = {
        "ours": partial(ours, reader),
        "webdataset": partial(theirs, tars),
        "webdataset and noise": partial(theirs_with_draws, tars),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            wall, spent = time.perf_counter(), time.process_time()
            side(images)
            rates[name].append(images / (time.perf_counter() - wall))
            cpu[name].append(images / (time.process_time() - spent))
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(cpu["ours"], cpu[name], strict=True)]
        print(
            f"  {name:22} {statistics.median(found):6.0f} img/s {spread(found)}, "
            f"{statistics.median(cpu[name]):6.0f} per CPU second {spread(cpu[name])}, "
            f"ours / it {statistics.median(ratios):.2f} {spread(ratios)}"
        )
    reader.close()
    first_batches(store, selection, folder, rounds)
    show_noise(size, rounds)


def show_noise(size: int, rounds: int) -> None:
    """The parts of a sample's noise: bits ahead of the step, and the noise itself, which a GPU would make of them."""
    shape, bits, noise = (3, size, size), [], []
    for position in range(4 * rounds):
        began = time.process_time()
        drawn = draw(0, [position], shape)
        middle = time.process_time()
        normal(drawn.bits_BN, shape)
        bits.append(middle - began)
        noise.append(time.process_time() - middle)
    both = " and ".join(f"{statistics.median(part) * 1e3:.2f} ms {spread(part, 1e3)}" for part in (bits, noise))
    print(f"  an image's bits and its noise {both} of CPU")


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

"""One corpus in the forms that several loaders read, and each loader as a stream of batches from a place in an epoch.

A stream yields uint8 images [B, H, W, 3] and their captions. All decode with simplejpeg but datago, which brings its
own decoder and reads pictures from files, without captions. Loaders that cannot begin at a place read up to it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
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
from training.diffusion.draws import draw
from training.encoders.text import Tokens
from training.loader.batches import Batches
from training.loader.cache import Folder, Tars
from training.loader.conditions import Captions
from training.loader.order import DataSettings
from training.loader.reader import Reader
from training.loader.selection import Selection

BATCH, SHARDS, TOKENS, PICTURES = 32, 4, 128, 64
WORDS = ["a", "photograph", "of", "an", "old", "wooden", "boat", "on", "calm", "water", "and", "hills", "behind"]
Delivered = tuple[torch.Tensor, list[str]]
Loader = Callable[[int], Generator[Delivered]]  # from the sample of that number in an epoch


class Corpus:
    """The same pictures as shards with a selection, as MDS shards, and as files."""

    def __init__(self, folder: Path, images: int, size: int) -> None:
        self.folder, self.images, self.size = folder, images, size
        self.rng = np.random.default_rng(0)
        self.pictures = [picture(self.rng, size) for _ in range(PICTURES)]
        self.captions = [" ".join(self.rng.choice(WORDS, 60)) for _ in range(images)]
        self.store = open_store(str(folder / "store"))
        self.selection = self._write_shards(self.store)

    @property
    def kilobytes(self) -> float:
        return float(np.mean([len(data) for data in self.pictures])) / 1e3

    def picture(self, row: int) -> bytes:
        return self.pictures[row % PICTURES]

    def _write_shards(self, store: Store) -> DataObject:
        columns: dict[str, list[Any]] = {name: [] for name in SELECTION_SCHEMA.names}
        for shard in range(SHARDS):
            packed = io.BytesIO()
            tar, members = TarWriter(packed), []
            for row in range(shard * self.images // SHARDS, (shard + 1) * self.images // SHARDS):
                members.append((row, tar.add(f"{row:08d}.jpg", self.picture(row))))
                tar.add(f"{row:08d}.txt", self.captions[row].encode())
            tar.finish()
            key = put_data(store, "t", f"{shard}.tar", packed.getvalue()).key
            for row, member in members:
                captions = [self.captions[row]] * 3, [1 / 3] * 3
                values = (f"{row:08d}", key, *member, self.size, self.size, *captions, "source", "bucket")
                for name, value in zip(SELECTION_SCHEMA.names, values, strict=True):
                    columns[name].append(value)
        table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in SELECTION_SCHEMA}, schema=SELECTION_SCHEMA)
        return put_data(store, "selections", "selection.parquet", parquet_bytes(table))

    def tars(self) -> list[str]:
        return sorted(str(path) for path in (self.folder / "store" / "t").glob("*.tar"))

    def mds(self) -> Path:
        from streaming import MDSWriter

        folder = self.folder / "mds"
        if not folder.exists():
            limit = (self.kilobytes * 1e3 + 500) * self.images / SHARDS
            columns = {"image": "bytes", "caption": "str"}
            with MDSWriter(out=str(folder), columns=columns, size_limit=int(limit)) as writer:
                for row in range(self.images):
                    writer.write({"image": self.picture(row), "caption": self.captions[row]})
        return folder

    def files(self) -> Path:
        folder = self.folder / "files"
        if not folder.exists():
            folder.mkdir()
            for row in range(self.images):
                (folder / f"{row:08d}.jpg").write_bytes(self.picture(row))
        return folder


def picture(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG with about the bytes of a photograph of its size: smoothed noise with grain."""
    coarse = torch.from_numpy(rng.normal(128, 50, (1, 3, size // 16, size // 16)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0].permute(1, 2, 0).numpy()
    grain = rng.normal(0, 9, (size, size, 3))
    return simplejpeg.encode_jpeg(np.clip(smooth + grain, 0, 255).astype(np.uint8), quality=92)


def words_as_tokens(captions: Sequence[str]) -> Tokens:
    """A stand-in for a tokenizer, which would have to be downloaded."""
    ids_BT = torch.zeros(len(captions), TOKENS, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = [hash(word) & 0xFFFF for word in caption.split()[:TOKENS]]
        ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    cut = [len(caption.split()) > TOKENS for caption in captions]
    return Tokens(ids_BT, (ids_BT != 0).long(), torch.tensor(cut))


def opened(corpus: Corpus, cache: Path) -> Reader:
    folder = Folder(cache, 100)
    return Reader(Selection.open(corpus.store, corpus.selection, folder), Tars(corpus.store, folder))


def ours(reader: Reader, start: int) -> Generator[Delivered]:
    """With tokens, and with the random bits of noise, times and drops."""
    settings = DataSettings(lanes=8, threads=1)
    batches = Batches(reader, settings, batch=BATCH, draw=partial(draw, 0), condition=Captions(reader, words_as_tokens))
    with closing(batches.iterate(start // BATCH * BATCH)) as stream:
        for batch in stream:
            yield batch.images_BCHW.permute(0, 2, 3, 1), batch.captions


def decoded(image: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(image, colorspace="RGB")


def joined(samples: Iterable[tuple[np.ndarray, str]]) -> Generator[Delivered]:
    stream = iter(samples)
    while batch := list(islice(stream, BATCH)):
        yield torch.from_numpy(np.stack([image for image, _ in batch])), [caption for _, caption in batch]


def webdataset_(corpus: Corpus, start: int) -> Generator[Delivered]:
    """The same tars, in one process, shuffled in a buffer of a thousand samples as its documentation does."""
    tars = corpus.tars()
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).slice(start, corpus.images)
    return joined((decoded(sample["jpg"]), sample["txt"].decode()) for sample in dataset)


def streaming(corpus: Corpus, start: int) -> Generator[Delivered]:
    """mosaicml-streaming on local MDS shards, in one process; it begins at a place by its own state."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(corpus.mds()), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    if start:
        state = dataset.state_dict(0, False) | {"sample_in_epoch": start, "epoch": 0}
        dataset.load_state_dict(state)
    return joined((decoded(sample["image"]), sample["caption"]) for sample in dataset)


def datago(corpus: Corpus, start: int) -> Generator[Delivered]:
    from datago import DatagoClient

    source = {"root_path": str(corpus.files()), "random_sampling": True, "rank": 0, "world_size": 1}
    settings = {
        "source_type": "file",
        "source_config": source,
        "limit": corpus.images,
        "samples_buffer_size": BATCH * 4,
    }
    client = DatagoClient(json.dumps(settings))

    def samples() -> Generator[tuple[np.ndarray, str]]:
        try:
            for _ in range(start):
                client.get_sample()
            while (sample := client.get_sample()) is not None:
                yield sample.image.to_numpy_array(), ""
        finally:
            client.stop()

    return joined(samples())


def with_noise(loader: Loader, start: int) -> Generator[Delivered]:
    """With the noise of each image, as training code draws it beside a loader that has none."""
    for images_BHWC, captions in loader(start):
        torch.randn(images_BHWC.shape)
        yield images_BHWC, captions


def peers(corpus: Corpus) -> dict[str, Loader]:
    """The other loaders that are installed; `make bench-loader` installs all of them."""
    loaders = {"webdataset": webdataset_, "streaming": streaming, "datago": datago}
    return {name: partial(loader, corpus) for name, loader in loaders.items() if find_spec(name) is not None}

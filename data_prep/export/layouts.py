"""The files that an export writes, as those know them who read them.

    webdataset     train/00000.tar           <key>.jpg, <key>.json and <key>.txt, as in our own shards
    huggingface    train/00000/<key>.jpg     a thousand to a folder
                   train/metadata.jsonl      `file_name`, `text` and the rest of every picture, a line for each

A file appears whole or not at all, so that one which is there need not be written again. Beside the tars lies nothing
else: `datasets` takes whatever lies there for a tar.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_prep.export.listing import Listing, Weights
from data_prep.sources.reading import in_order
from infra.shards import TarWriter, sidecar
from infra.store import Store, spool_path

MIB = 1 << 20
FOLDER = 1000  # pictures of a folder
BESIDE = 3 << 10  # bytes of a tar that an image's JSON, text and headers come to, more or less


class Layout(ABC):
    """One split of an export: its parts in any order, and what closes it."""

    def __init__(self, to: Store, split: str, suffix: str, listing: Listing) -> None:
        self._to, self._split, self._suffix, self._listing = to, split, suffix, listing

    @abstractmethod
    def weigh(self, rows: pa.Table) -> Weights:
        """What each row adds to a part."""

    @abstractmethod
    def write(self, number: int, part: pa.Table) -> None:
        """A part, unless it is there."""

    @abstractmethod
    def close(self) -> None:
        """What follows once all parts are there."""

    def parts(self) -> Iterator[pa.Table]:
        return self._listing.parts(self.limit, self.weigh)

    limit: int  # of a part's weight


class WebDataset(Layout):
    def __init__(self, to: Store, split: str, suffix: str, listing: Listing, tar_mib: int) -> None:
        super().__init__(to, split, suffix, listing)
        self.limit = tar_mib * MIB

    def weigh(self, rows: pa.Table) -> Weights:
        weights: Weights = rows["length"].to_numpy() + BESIDE
        return weights

    def write(self, number: int, part: pa.Table) -> None:
        key = f"{self._split}/{number:05d}.tar"
        if self._to.exists(key):
            return
        with self._to.spool() as file:
            tar = TarWriter(file)
            for sample, image in self._listing.read(part):
                tar.add(f"{sample.name}.{self._suffix}", image)
                tar.add(f"{sample.name}.json", sidecar(sample.about).encode())
                tar.add(f"{sample.name}.txt", sample.text.encode())
            tar.finish()
            self._to.put(key, spool_path(file))

    def close(self) -> None:
        """Nothing: the tars are all."""


class HuggingFace(Layout):
    limit = FOLDER

    def weigh(self, rows: pa.Table) -> Weights:
        return np.ones(rows.num_rows, np.int64)

    def write(self, number: int, part: pa.Table) -> None:
        there = {entry.key: entry.size for entry in self._to.list(f"{self._split}/{number:05d}/")}
        names = [self._name(number, name) for name in part["name"].to_pylist()]
        missing = [
            there.get(f"{self._split}/{name}") != length
            for name, length in zip(names, part["length"].to_pylist(), strict=True)
        ]
        for sample, image in self._listing.read(part.filter(pa.array(missing))):
            self._to.put(f"{self._split}/{self._name(number, sample.name)}", image)

    def close(self) -> None:
        with self._to.spool() as file:
            for lines in in_order(lambda part: self._lines(*part), enumerate(self.parts())):
                file.write(lines)
            self._to.put(f"{self._split}/metadata.jsonl", spool_path(file))

    def _lines(self, number: int, part: pa.Table) -> bytes:
        named = ({**one.about, "file_name": self._name(number, one.name)} for one in self._listing.described(part))
        return "".join(f"{sidecar(about)}\n" for about in named).encode()

    def _name(self, number: int, name: str) -> str:
        return f"{number:05d}/{name}.{self._suffix}"

"""The file layouts of an export, in the formats of WebDataset and of Hugging Face's `datasets`.

    webdataset     train/00000.tar           <key>.jpg, <key>.json and <key>.txt, as in our own shards
    huggingface    train/00000/<key>.jpg     a thousand images to a folder
                   train/metadata.jsonl      one line for each image: `file_name`, `text` and its other fields

A file appears whole or not at all, so one that exists need not be written again. No other file is put beside the tars,
since `datasets` would take it for a tar.
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
FOLDER = 1000  # images of a folder
EXTRA = 3 << 10  # bytes that an image's JSON, text and headers add to a tar, roughly


class Layout(ABC):
    """Writes one split of an export: its parts (tars, or folders) in any order, then `close`."""

    limit: int  # of a part's weight

    def __init__(self, to: Store, split: str, suffix: str, listing: Listing) -> None:
        self._to, self._split, self._suffix, self._listing = to, split, suffix, listing

    @abstractmethod
    def weigh(self, rows: pa.Table) -> Weights:
        """How much each row adds to the weight of a part: bytes of a tar, or images of a folder."""

    @abstractmethod
    def write(self, number: int, part: pa.Table) -> None:
        """Write a part, unless it is there already."""

    def close(self) -> None:  # noqa: B027 - tars need nothing else
        """Write what can only be written when all parts are there."""

    def parts(self) -> Iterator[pa.Table]:
        return self._listing.parts(self.limit, self.weigh)


class WebDataset(Layout):
    def __init__(self, to: Store, split: str, suffix: str, listing: Listing, tar_mib: int) -> None:
        super().__init__(to, split, suffix, listing)
        self.limit = tar_mib * MIB

    def weigh(self, rows: pa.Table) -> Weights:
        weights: Weights = rows["length"].to_numpy() + EXTRA
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


class HuggingFace(Layout):
    limit = FOLDER

    def weigh(self, rows: pa.Table) -> Weights:
        return np.ones(rows.num_rows, np.int64)

    def write(self, number: int, part: pa.Table) -> None:
        sizes = {entry.key: entry.size for entry in self._to.list(f"{self._split}/{number:05d}/")}
        lengths = zip(part["name"].to_pylist(), part["length"].to_pylist(), strict=True)
        missing = [sizes.get(f"{self._split}/{self._name(number, name)}") != length for name, length in lengths]
        for sample, image in self._listing.read(part.filter(pa.array(missing))):
            self._to.put(f"{self._split}/{self._name(number, sample.name)}", image)

    def close(self) -> None:
        with self._to.spool() as file:
            for lines in in_order(lambda numbered: self._lines(*numbered), enumerate(self.parts())):
                file.write(lines)
            self._to.put(f"{self._split}/metadata.jsonl", spool_path(file))

    def _lines(self, number: int, part: pa.Table) -> bytes:
        """The lines of metadata.jsonl for one folder."""
        samples = self._listing.described(part)
        fields = ({**sample.about, "file_name": self._name(number, sample.name)} for sample in samples)
        return "".join(f"{sidecar(line)}\n" for line in fields).encode()

    def _name(self, number: int, name: str) -> str:
        return f"{number:05d}/{name}.{self._suffix}"

"""The interface of a source: a corpus in its owner's format, which is read as one stream of raw items.

A kind of source is a settings class in a file of its own, with a `kind`. It lists its inputs, cuts them into ranges
(each is read by one task), and reads a range. Code that several kinds share is in `tables`, `listings` and `tars`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Rejection
from infra.config import Name, Settings, operational
from infra.errors import SettingsError
from infra.problems import did_you_mean
from infra.shards import INDEX_SCHEMA, SPLIT_DIGITS, sample_key
from infra.store import Store

# Suffixes of images. Those that cannot be decoded here are in it too, so that such files are refused and counted.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".mpo", ".apng"),
    *(".dib", ".avifs", ".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf"),
    *(".jpx", ".jpm", ".svg", ".svgz", ".psd", ".psb", ".tga", ".ico", ".pcx", ".pbm", ".pgm", ".ppm", ".pnm", ".qoi"),
    *(".exr", ".jxr", ".wdp"),
)
# Formats that users have and no source reads, with what to do about each.
FOREIGN = {
    ".mds": "MosaicML's MDS is read by its own library alone: let `streaming.StreamingDataset(local=FOLDER, "
    "batch_size=1)` give each sample to `webdataset.ShardWriter.write` as {'__key__': ..., 'png': ..., 'txt': ...}, "
    "and name the tars",
    ".arrow": "`Dataset.save_to_disk` writes Arrow: write it with `to_parquet`",
    ".xz": "unpack it, or pack it with gzip or zstd",
    ".lz4": "unpack it, or pack it with gzip or zstd",
    ".zip": "unpack it into a folder",
    ".7z": "unpack it into a folder",
    ".rar": "unpack it into a folder",
    ".xlsx": "write it as CSV",
    ".sqlite": "write the table as Parquet or CSV",
    ".lmdb": "write it as tars or Parquet",
    ".mdb": "write it as tars or Parquet",
    ".tfrecord": "write it as tars or Parquet",
    ".beton": "write it as tars or Parquet",
    ".npz": "write it as tars or Parquet",
    ".pkl": "write it as tars or Parquet: a pickle runs whatever it likes",
}
ROW = "pixnerd_row"  # the column of a table of selected rows that holds each row's number in the input
DAMAGE = "pixnerd_damage"  # the column of a converted table that says why a row could not be read, else null


class Input(NamedTuple):
    """One input of a source: a table, a tar, or the listing of a folder (then `size` is its rows)."""

    name: str
    size: int
    sha256: str  # identity of the content
    table: str = ""  # the key of a stored listing; not part of the identity


class Rows(NamedTuple):
    """The part of an input that one planned shard is made of: rows of a table, or of a listing."""

    input: str
    table: str
    in_store: bool
    first: int
    rows: int


class Bytes(NamedTuple):
    """The part of a tar that one planned shard is made of: samples whose first header is in [first, first + size)."""

    input: str
    table: str  # the table of their captions, where these are not in the tar
    in_store: bool
    first: int
    size: int


Range = Rows | Bytes


class Url(str):
    """The address of an image that must be downloaded first, normalised to the form in which it is requested."""

    __slots__ = ()


class Keys:
    """Makes the keys of one shard's items distinct.

    A repeated key is replaced by one made of it and of the number of times that it has come. The first digits stay:
    they decide whether a sample is held out, so that copies of an image are never on both sides of the split.
    """

    def __init__(self) -> None:
        self._times = Counter[str]()

    def distinct(self, key: str) -> str:
        unused, times = key, self._times[key]
        while unused in self._times:
            unused = key[:SPLIT_DIGITS] + sample_key(key, str(times))[SPLIT_DIGITS:]
            times += 1
        self._times[unused] = 1
        self._times[key] = max(1, times)
        return unused


class RawItem(NamedTuple):
    row: int  # its number in the input; in a tar, that of the sample, counted from the tar's start
    key: str
    name: str  # what the corpus calls it, to be shown to people
    image: bytes | Url | Rejection
    captions: list[dict[str, str]]  # {"kind", "text"}
    licence: str
    origin: str
    kept: dict[str, Any]


class Source(Settings):
    """A corpus in its owner's format."""

    name: Name  # it is hashed into a sample's key and stored in its `source` column
    # Operational, since a corpus may be moved: inputs are identified by their hashes.
    url: str = operational(description="a folder, or a store URL such as s3://bucket/prefix")
    licence: str = ""
    origin: str = Field("", description="where the corpus comes from: the URL of its page, its name")
    max_bytes: int = Field(64 * 2**20, ge=1, description="larger files are refused")
    max_caption: int = Field(20_000, ge=1, description="inputs with a longer caption are refused (characters)")

    kind: str
    joins_tables: ClassVar[bool] = False  # some inputs have no items of their own but captions for other inputs' items

    @abstractmethod
    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        """Every input and its identity. With a store, the listings of a folder are written to it as well.

        `planned` are the ranges of an earlier plan: of a folder that has only grown, the listings in them are kept and
        the new files are listed apart.
        """

    @abstractmethod
    def ranges(self, store: Store, entry: Input, rows: int) -> Iterator[Range]:
        """Cut an input into ranges of about `rows` items that cover it once, in order.

        A table that is not Parquet is written to the store as Parquet first. An input without items of its own
        (captions for other inputs) has no ranges.
        """

    @abstractmethod
    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        """Every item of the range in order, also those that cannot be read; two may have the same key."""

    def items(self, store: Store, part: Range) -> Iterator[RawItem]:
        """As `read`, with distinct keys."""
        keys = Keys()
        for item in self.read(store, part):
            yield item._replace(key=keys.distinct(item.key))

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        """The columns that it adds to the index; a type is None where only the table knows it."""
        return {}

    def kept_fields(self, store: Store, part: Range) -> list[pa.Field]:
        """The same columns in their order in the index, with the types that a range's table gives them."""
        return [pa.field(name, kind) for name, kind in self.kept_columns().items()]


class UrlSource(Source):
    """A source whose items are URLs: the images are downloaded before shards are made of them."""

    image: str  # the column of URLs

    @abstractmethod
    def urls(self, store: Store, part: Range) -> Iterator[tuple[int, str | Rejection]]:
        """The URLs of a range with their row numbers; no other column is read."""


def check_kept(name: str) -> None:
    """Refuse the name of a kept column that the index uses for a column of its own."""
    if name in INDEX_SCHEMA.names or name in (ROW, DAMAGE):
        raise SettingsError(
            f"the index has its own column `{name}`", remedy="keep the corpus's under another name, or not at all"
        )


def missing_column(table: str, column: str, known: list[str]) -> SettingsError:
    remedy = did_you_mean(column, known, f"its columns are {', '.join(known[:50])}")
    return SettingsError(f"{table} has no column `{column}`", remedy=remedy)


def foreign(name: str) -> str:
    """What to do about a file whose format no source reads, by its suffix; empty for formats not in FOREIGN."""
    plain = name.lower().removesuffix(".zstd").removesuffix(".zst").removesuffix(".gz")
    return next((remedy for suffix, remedy in FOREIGN.items() if plain.endswith(suffix)), "")

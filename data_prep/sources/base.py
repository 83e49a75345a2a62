"""What a source is: a corpus as its owner has it, which becomes one stream of raw items.

A kind of source is a settings class in a file of its own, with a `kind`. It tells what it is made of, cuts that into
pieces, each the work of one task, and reads a piece. What several kinds share stands in `tables`, `listings`, `tars`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Rejection
from infra.config import Settings, nearest, operational, spelt
from infra.errors import SettingsError
from infra.shards import INDEX_SCHEMA, SPLIT_DIGITS, sample_key
from infra.store import Store

# What a corpus means as a picture, also of kinds that nobody here can read: those are refused, and counted.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".mpo", ".apng"),
    *(".dib", ".avifs", ".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf"),
    *(".jpx", ".jpm", ".svg", ".svgz", ".psd", ".psb", ".tga", ".ico", ".pcx", ".pbm", ".pgm", ".ppm", ".pnm", ".qoi"),
    *(".exr", ".jxr", ".wdp"),
)
# What people have their data in and no source reads, and what to do about it.
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
ROW = "pixnerd_row"  # in a table of selected rows: which row of the input each one is
DAMAGE = "pixnerd_damage"  # in a table that was turned into Parquet: why there is nothing in the row

SourceName = Annotated[
    str,
    spelt(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "at most 100 letters, digits, `_`, `.` and `-`, no mark first"),
]


class Input(NamedTuple):
    """One input of a source: a table, a tar, or the listing of a folder (then `size` is its rows)."""

    name: str
    size: int
    sha256: str  # identity of the content
    table: str = ""  # where a listing was put in the store: no part of the identity


class Rows(NamedTuple):
    """A planned shard's part of an input: rows of a table, or of a listing."""

    input: str
    table: str
    in_store: bool
    first: int
    rows: int


class Bytes(NamedTuple):
    """A planned shard's part of a tar: the samples whose first header starts in [first, first + size)."""

    input: str
    table: str  # of captions for them, where the tar does not hold them
    in_store: bool
    first: int
    size: int


Range = Rows | Bytes


class Url(str):
    """An image that must be downloaded first; as it will be asked for, however the corpus spells it."""

    __slots__ = ()


class Keys:
    """The keys of items that stand together, no two of which are equal.

    What comes again gets a key of its own by how often it has come, which begins as the first one does: the first
    digits decide whether a sample is held out, so one picture is never on both sides.
    """

    def __init__(self) -> None:
        self._times = Counter[str]()

    def distinct(self, key: str) -> str:
        found, times = key, self._times[key]
        while found in self._times:
            found = key[:SPLIT_DIGITS] + sample_key(key, str(times))[SPLIT_DIGITS:]
            times += 1
        self._times[found] = 1
        self._times[key] = max(1, times)
        return found


class RawItem(NamedTuple):
    row: int  # in the input: of a tar, the sample's place in the whole tar
    key: str
    name: str  # for people: what the corpus calls it
    image: bytes | Url | Rejection
    captions: list[dict[str, str]]  # {"kind", "text"}
    licence: str
    origin: str
    kept: dict[str, Any]


class Source(Settings):
    """A corpus as its owner has it."""

    name: SourceName  # a sample's key and its `source` column come from it
    # Where the bytes lie is no part of what they are: the inputs' hashes are. A corpus may be moved.
    url: str = operational(description="a folder, or a store URL such as s3://bucket/prefix")
    licence: str = ""
    origin: str = Field("", description="where the corpus comes from: the URL of its page, its name")
    max_bytes: int = Field(64 * 2**20, ge=1, description="larger files are refused")
    max_caption: int = Field(20_000, ge=1, description="inputs with a longer caption are refused (characters)")

    kind: str
    joins_tables: ClassVar[bool] = False  # some inputs have no items of their own: they say something of other inputs'

    @abstractmethod
    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        """Every input and its identity. A folder's listing goes to the store; without one, identities are all there is.

        `planned` are the pieces of an earlier plan: a folder that has only grown is its old listings and one of the
        rest.
        """

    @abstractmethod
    def ranges(self, store: Store, found: Input, rows: int) -> Iterator[Range]:
        """The input in pieces of about `rows` items that cover it once, in order.

        Tables that are not Parquet are written to the store as such. An input may have no items of its own (captions
        for other inputs); then there are no pieces.
        """

    @abstractmethod
    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        """Every input of the piece, in order, each an item whatever became of it; two may have one key."""

    def items(self, store: Store, part: Range) -> Iterator[RawItem]:
        """The same, with a key of its own for each."""
        keys = Keys()
        for item in self.read(store, part):
            yield item._replace(key=keys.distinct(item.key))

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        """The columns that it adds to the index, as far as its settings tell: a table's types are in the table."""
        return {}

    def kept_fields(self, store: Store, part: Range) -> list[pa.Field]:
        """The same, in their order in the index, once a piece can be looked at."""
        return [pa.field(name, kind) for name, kind in self.kept_columns().items()]


class UrlSource(Source):
    """A source whose items are addresses: what they lead to is downloaded before shards are made of it."""

    image: str  # the column of addresses

    @abstractmethod
    def urls(self, store: Store, part: Range) -> Iterator[tuple[int, str | Rejection]]:
        """A piece's addresses with their rows, read from their column alone."""


def check_kept(name: str) -> None:
    """A kept column stands in the index beside the index's own."""
    if name in INDEX_SCHEMA.names or name in (ROW, DAMAGE):
        raise SettingsError(
            f"the index has its own column `{name}`", remedy="keep the corpus's under another name, or not at all"
        )


def missing_column(table: str, column: str, known: list[str]) -> SettingsError:
    near = nearest(column, known)
    return SettingsError(
        f"{table} has no column `{column}`",
        remedy=f"did you mean `{near}`?" if near else f"its columns are {', '.join(known[:50])}",
    )


def foreign(name: str) -> str:
    """What to do about a file of a kind that no source reads, if it is a known one."""
    plain = name.lower().removesuffix(".zstd").removesuffix(".zst").removesuffix(".gz")
    return next((what for suffix, what in FOREIGN.items() if plain.endswith(suffix)), "")

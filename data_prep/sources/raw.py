"""The nouns of the sources: what every kind of corpus is made into, and the settings that all of them share."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from data_prep.rejections import Rejection
from infra.config import Settings, nearest, operational, spelt
from infra.errors import SettingsError
from infra.shards import INDEX_SCHEMA, SPLIT_DIGITS, sample_key

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


class Corpus(Settings):
    name: SourceName  # a sample's key and its `source` column come from it
    # Where the bytes lie is no part of what they are: the inputs' hashes are. A corpus may be moved.
    url: str = operational(description="a folder, or a store URL such as s3://bucket/prefix")
    licence: str = ""
    origin: str = Field("", description="where the corpus comes from: the URL of its page, its name")
    max_bytes: int = Field(64 * 2**20, ge=1, description="larger files are refused")
    max_caption: int = Field(20_000, ge=1, description="inputs with a longer caption are refused (characters)")


class Input(NamedTuple):
    """One input of a source: a table, a tar, or the listing of a folder (then `size` is its rows)."""

    name: str
    size: int
    sha256: str  # identity of the content
    table: str = ""  # where a listing was put in the store: no part of the identity


class Range(NamedTuple):
    """A planned shard's part of an input: rows of a table, or bytes of a tar.

    Of a tar it means the samples whose first header starts in [first, first + rows).
    """

    input: str
    table: str
    in_store: bool
    first: int
    rows: int


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

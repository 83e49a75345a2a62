"""Corpora that tables describe: images in a folder beside them, on the web, or in the tables themselves.

A table's identity is the sha256 of its file. Where its rows name images of the folder, the sizes of those images count
too, so that an image that comes, goes or changes its size is noticed, and no other table's images are. A Parquet that
holds images may be as large as the corpus: of it the head and the tail count, which holds the place and the length of
all its columns. JSONL and CSV are turned into Parquet when they are planned.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from data_prep.addresses import http_url
from data_prep.folders import Folder, fingerprint, matching, open_folder
from data_prep.rejections import Cause, Rejection
from data_prep.sources import parquet, words
from data_prep.sources.convert import Columns, converted, lines
from data_prep.sources.raw import Corpus, Input, Range, RawItem, Url, check_kept, missing_column
from infra.config import operational
from infra.errors import SettingsError
from infra.shards import sample_key
from infra.store import Store

READERS = 8  # files measured at once
IMAGE_BATCH = 8  # rows whose images are in memory at once
NAME_BATCH = 10_000


class Tables(Corpus):
    # Which inputs there are is told by the inputs themselves: another one extends a plan and makes no other.
    tables: list[str] = operational(min_length=1, description="paths in the folder, or patterns such as data/*.parquet")
    image: str
    captions: list[str] = Field(["caption"], description="columns of text, or of lists of texts; none: images alone")
    keep: list[str] = Field([], description="further columns to carry into the index, to filter by")
    licence_column: str | None = None

    def texts(self) -> list[str]:
        """The columns that hold a text each."""
        return [self.image, *([self.licence_column] if self.licence_column else [])]


class TableFolder(Tables):
    """Images in a folder, named by the rows of Parquet, JSONL or CSV tables in it."""

    kind: Literal["table_folder"]
    image: str = Field("image", description="the column that names the image, relative to the folder")
    origin_column: str | None = None

    def texts(self) -> list[str]:
        return [*super().texts(), *([self.origin_column] if self.origin_column else [])]


class UrlList(Tables):
    """Images on the web, named by the rows of Parquet, JSONL or CSV tables in a folder; an item's origin is its URL."""

    kind: Literal["url_list"]
    image: str = Field("url", description="the column of URLs")


class ParquetImages(Tables):
    """Images in a column of Parquet tables: plain bytes, or the {bytes, path} pairs that Hugging Face writes.

    Of such a table no more is in memory than a few rows' images and the pages of the file that they lie in.
    """

    kind: Literal["parquet_images"]
    image: str = Field("image", description="the column of images")
    # Where these lie is no part of what they are either: a key is made of a picture's bytes.
    files: str | None = operational(
        None, description="the folder of the pictures of which a row holds the path alone, and no bytes"
    )
    origin_column: str | None = None

    def texts(self) -> list[str]:
        texts = [*super().texts(), *([self.origin_column] if self.origin_column else [])]
        return [column for column in texts if column != self.image]


TableSource = TableFolder | UrlList | ParquetImages


def inputs(source: TableSource, store: Store | None, planned: Sequence[Range] = ()) -> list[Input]:
    folder = open_folder(source.url)
    names = matching(folder, source.tables, "tables")
    with ThreadPoolExecutor(READERS) as pool:
        if isinstance(source, ParquetImages):
            tables = list(pool.map(lambda name: Input(name, *fingerprint(folder, name)), names))
            if source.files is None:
                return tables
            files = _Files(source.files)
            sizes = _Sizes(files.folder)
            return [_with_images(source, folder, table, sizes, files) for table in tables]
        found = list(pool.map(lambda name: measured(folder, name), names))
    if isinstance(source, TableFolder):
        sizes = _Sizes(folder)
        found = [_with_images(source, folder, table, sizes) for table in found]
    return found


def ranges(source: TableSource, store: Store, found: Input, rows: int) -> Iterator[Range]:
    folder, name = open_folder(source.url), found.name
    if name.endswith(".parquet"):
        with parquet.opened(folder.open(name), name) as file:
            if not file.metadata.num_rows:
                return
            _check(source, name, file.schema_arrow)
            groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        table, in_store = name, False
    else:
        if isinstance(source, ParquetImages):
            raise SettingsError(f"{name} is no Parquet file", remedy="name tables that end in .parquet")
        for column in source.keep:
            check_kept(column)
        made = converted(store, source.name, folder, name, _columns(source))
        if made is None:
            return
        where, count = made
        groups, table, in_store = [count], where.key, True
        with parquet.opened(parquet.open_rows(source, store, Range(name, table, True, 0, 0)), table) as file:
            _check(source, name, file.schema_arrow)
    # A row group with images is read from its beginning, so cuts between groups are cheapest.
    for first, count in _cuts(groups if isinstance(source, ParquetImages) else [sum(groups)], rows):
        yield Range(name, table, in_store, first, count)


def _cuts(groups: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """Small groups are joined up to `rows`, large ones are cut into pieces of `rows`."""
    first, held = 0, 0
    for count in groups:
        if held and held + count > rows:
            yield first, held
            first, held = first + held, 0
        held += count
        while held >= rows:
            yield first, rows
            first, held = first + rows, held - rows
    if held:
        yield first, held


def kept_fields(source: TableSource, store: Store, part: Range) -> list[pa.Field]:
    return parquet.kept_fields(source, store, part, source.keep)


def kept_columns(source: TableSource) -> dict[str, None]:
    return dict.fromkeys(source.keep)


def items(source: TableSource, store: Store, part: Range) -> Iterator[RawItem]:
    folder = open_folder(source.url)
    batch = IMAGE_BATCH if isinstance(source, ParquetImages) else parquet.BATCH
    files = _Files(source.files) if isinstance(source, ParquetImages) and source.files is not None else None
    for number, row in parquet.rows(source, store, part, _columns(source).names, batch):
        yield _item(source, folder, files, part.input, number, row)


def urls(source: UrlList, store: Store, part: Range) -> Iterator[tuple[int, str | Rejection]]:
    for number, row in parquet.rows(source, store, part, [source.image], NAME_BATCH):
        yield number, _url(row[source.image])


# One item


def _item(
    source: TableSource, folder: Folder, files: _Files | None, table: str, number: int, row: dict[str, Any]
) -> RawItem:
    place = f"{table}#{number}"
    captions = words.captions([(kind, row[kind]) for kind in source.captions], source.max_caption)
    name, identity, image = _image(source, files, row, place)
    if not isinstance(image, Rejection):
        if isinstance(captions, Rejection):
            image = captions
        elif source.captions and not captions:
            image = Rejection(Cause.NO_CAPTION)
        elif image is None:
            image = folder.read(name, source.max_bytes)
    own = None if isinstance(source, UrlList) or not source.origin_column else row[source.origin_column]
    return RawItem(
        row=number,
        key=sample_key(source.name, identity or f"\0{place}"),
        name=words.shown(name),
        image=image,
        captions=[] if isinstance(captions, Rejection) else captions,
        licence=words.or_else(row[source.licence_column] if source.licence_column else None, source.licence),
        origin=words.shown(name) if isinstance(source, UrlList) else words.or_else(own, source.origin),
        kept={column: words.kept(row[column]) for column in source.keep},
    )


class _Image(NamedTuple):
    name: str
    identity: str | None  # what tells it from all others, wherever a row names it; never with a NUL in front
    image: bytes | Url | Rejection | None  # None: to be read by its name


def _image(source: TableSource, files: _Files | None, row: dict[str, Any], place: str) -> _Image:
    value = row[source.image]
    if isinstance(source, ParquetImages):
        return _embedded(value, files, place, source.max_bytes)
    name = words.text(value) or ""
    if isinstance(source, UrlList):
        name, found = name.strip(), _url(value)
        return _Image(name, _plain(name), found)
    return _Image(name, _plain(name), None if name else Rejection(Cause.BAD_NAME, "empty or not UTF-8"))


def _plain(name: str) -> str | None:
    """No URL and no file begins with a NUL; who writes one means a place, to be taken for another row."""
    return name if name and not name.startswith("\0") else None


def _url(value: bytes | str | None) -> Url | Rejection:
    name = words.text(value)
    if not name or not name.strip():
        return Rejection(Cause.BAD_URL, "empty or not UTF-8")
    found = http_url(name.strip())
    return found if isinstance(found, Rejection) else Url(found.text)


def _embedded(value: Any, files: _Files | None, place: str, limit: int) -> _Image:
    path: str | None = None
    if isinstance(value, dict):
        value, path = value["bytes"], words.text(value.get("path"))
    name = path or place
    if value is None and path and files is not None:
        value = files.folder.read(files.inside(path), limit)
        if isinstance(value, Rejection):
            return _Image(name, None, value)
    if value is None:
        return _Image(name, None, Rejection(Cause.MISSING, "the row holds no bytes"))
    if len(value) > limit:
        return _Image(name, None, Rejection(Cause.TOO_MANY_BYTES, f"{len(value)} bytes"))
    return _Image(name, hashlib.sha256(value).hexdigest(), value)


class _Files:
    """The folder of pictures that rows name by path alone; absolute paths count from where the folder lies."""

    def __init__(self, url: str) -> None:
        self.folder = open_folder(url)
        self._root = os.path.abspath(url.removeprefix("file://"))

    def inside(self, path: str) -> str:
        return path.removeprefix(f"{self._root}/")


# Columns


def _columns(source: TableSource) -> Columns:
    image = [source.image] if isinstance(source, ParquetImages) else []
    return Columns(image, source.texts(), source.captions, source.keep)


def _check(source: TableSource, name: str, schema: pa.Schema) -> None:
    check_columns(_columns(source), name, schema)
    if isinstance(source, ParquetImages):
        kind = schema.field(source.image).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not parquet.is_bytes(inner) and not pa.types.is_null(inner):
            raise SettingsError(
                f"column `{source.image}` of {name} is {kind}", remedy="name a column of bytes, or of {bytes, path}"
            )
        if source.files is not None and (inner is kind or kind.get_field_index("path") < 0):
            raise SettingsError(f"column `{source.image}` of {name} has no paths", remedy="leave `files` out")


def check_columns(columns: Columns, name: str, schema: pa.Schema) -> None:
    for column in columns.names:
        if column not in schema.names:
            raise missing_column(name, column, schema.names)
        if schema.names.count(column) > 1:
            raise SettingsError(f"{name} has two columns `{column}`", remedy="rename one of them")
    for column in [*columns.texts, *columns.captions]:
        kind = schema.field(column).type
        if column in columns.captions and parquet.is_list(kind):
            kind = kind.value_type
        if not parquet.is_text(kind):
            raise SettingsError(f"column `{column}` of {name} is {kind}, not text", remedy="name a column of text")
    for column in columns.kept:
        check_kept(column)
        kind = schema.field(column).type
        if parquet.plain_type(kind) is None:
            raise SettingsError(
                f"column `{column}` of {name} is {kind}", remedy="keep columns of numbers, booleans and texts"
            )


# Identity


def measured(folder: Folder, name: str) -> Input:
    with folder.open(name) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return Input(name, file.tell(), sha256)


class _Sizes:
    """The folder's files as two columns, by hash of the name: 16 bytes a file, however long its name is."""

    def __init__(self, folder: Folder) -> None:
        hashes, sizes = array("Q"), array("q")
        for name, size, _ in folder.names():
            hashes.append(_hash(name.encode(errors="surrogateescape")))
            sizes.append(size)
        found = np.frombuffer(hashes, np.uint64)
        order = np.argsort(found, kind="stable")
        self._hashes, self._sizes = found[order], np.frombuffer(sizes, np.int64)[order]

    def of(self, names: Sequence[bytes | None]) -> npt.NDArray[np.int64]:
        """The size of each, -1 where there is no such file."""
        wanted = np.array([_hash(_normal(name or b"")) for name in names], np.uint64)
        at = np.searchsorted(self._hashes, wanted)
        near = np.minimum(at, max(0, len(self._hashes) - 1))
        if not len(self._hashes):
            return np.full(len(names), -1, np.int64)
        return np.where(self._hashes[near] == wanted, self._sizes[near], -1).astype("<i8")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _normal(name: bytes) -> bytes:
    return posixpath.normpath(name) if b"./" in name or b"//" in name else name


def _with_images(
    source: TableFolder | ParquetImages, folder: Folder, table: Input, sizes: _Sizes, files: _Files | None = None
) -> Input:
    sha256 = hashlib.sha256(bytes.fromhex(table.sha256))
    for names in _image_names(source, folder, table.name):
        if files is not None:
            names = [name and os.fsencode(files.inside(os.fsdecode(name))) for name in names]
        sha256.update(sizes.of(names).tobytes())
    return table._replace(sha256=sha256.hexdigest())


def _image_names(source: TableFolder | ParquetImages, folder: Folder, table: str) -> Iterator[list[bytes | None]]:
    if table.endswith(".parquet"):
        with parquet.opened(folder.open(table), table) as file:
            if not file.metadata.num_rows:
                return
            _check(source, table, file.schema_arrow)
            paths = isinstance(source, ParquetImages)
            column = f"{source.image}.path" if paths else source.image
            for batch in file.iter_batches(NAME_BATCH, columns=[column], use_threads=False):
                names = batch.column(0).field("path") if paths else batch.column(0)
                yield names.cast(pa.binary()).to_pylist()
        return
    held: list[bytes | None] = []
    for line in lines(folder, table):
        value = (line or {}).get(source.image)
        held.append(value.encode(errors="surrogatepass") if isinstance(value, str) else None)
        if len(held) == NAME_BATCH:
            yield held
            held = []
    yield held

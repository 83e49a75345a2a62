"""Corpora that tables describe: images in a folder beside them, on the web, or in the tables themselves.

A table's identity is the sha256 of its file. Where its rows name images of the folder, the sizes of those images count
too, so that an image that comes, goes or changes its size is noticed, and no other table's images are; and so does what
has become of images that were replaced by others of the same size (`looked`). A Parquet that holds images may be as
large as the corpus: of it the head and the tail count, which holds the place and the length of all its columns. Tables
of text are turned into Parquet when they are planned.

A column is named as it is called, or by a path into what it holds: `captions.short`, `sentences.raw`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import fields, looked, named, parquet, words
from data_prep.sources.convert import Columns, converted
from data_prep.sources.folders import Folder, fingerprint, matching, open_folder
from data_prep.sources.lines import is_parquet, kind_of, lines
from data_prep.sources.named import Files
from data_prep.sources.raw import Corpus, Input, Range, RawItem, Url, check_kept, foreign, missing_column
from data_prep.web.addresses import http_url
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
    captions: list[str] = Field(
        ["caption"],
        description="columns of text, or of lists or structs of texts, or paths such as sentences.raw; "
        "none: images alone",
    )
    keep: list[str] = Field([], description="further columns to carry into the index, to filter by")
    licence_column: str | None = None
    header: list[str] = Field([], description="the columns of CSV and TSV whose first line does not name them")

    def texts(self) -> list[str]:
        """The columns that hold a text each."""
        return [self.image, *([self.licence_column] if self.licence_column else [])]


class TableFolder(Tables):
    """Images in a folder, named by the rows of tables in it: Parquet, JSON lines or arrays, CSV or TSV."""

    kind: Literal["table_folder"]
    image: str = Field("image", description="the column that names the image, relative to the folder")
    origin_column: str | None = None

    def texts(self) -> list[str]:
        return [*super().texts(), *([self.origin_column] if self.origin_column else [])]


class UrlList(Tables):
    """Images on the web, named by the rows of tables in a folder, as of a table_folder; an item's origin is its URL."""

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
    for name in names:
        if not kind_of(name) and (what := foreign(name)):
            raise SettingsError(f"{name} is no table", remedy=what)
        if source.header and kind_of(name) not in (".csv", ".tsv"):
            raise SettingsError(
                f"{name} names its columns itself", remedy="leave `header` out, or make another source of it"
            )
    with ThreadPoolExecutor(READERS) as pool:
        if isinstance(source, ParquetImages):
            found = list(pool.map(lambda name: Input(name, *fingerprint(folder, name)), names))
        else:
            found = list(pool.map(lambda name: measured(folder, name), names))
    if isinstance(source, UrlList) or (isinstance(source, ParquetImages) and source.files is None):
        return found
    files = Files(source.files) if isinstance(source, ParquetImages) and source.files is not None else None
    beside = files.folder if files else folder
    sizes = named.Sizes(beside)
    return [
        named.with_images(
            table,
            partial(_image_names, source, folder, table.name, files),
            sizes,
            beside,
            source.max_bytes,
            (store, named.place(source.name, folder, table.name)) if store else None,
        )
        for table in found
    ]


def ranges(source: TableSource, store: Store, found: Input, rows: int) -> Iterator[Range]:
    folder, name = open_folder(source.url), found.name
    if is_parquet(name):
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
        made = converted(store, source.name, folder, name, _columns(source), source.header)
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
    reading = _Reading(source, store, part)
    batch = IMAGE_BATCH if isinstance(source, ParquetImages) else parquet.BATCH
    for number, row in parquet.rows(source, store, part, _columns(source).names, batch):
        yield reading.lost(number, row) if isinstance(row, Rejection) else reading.item(number, row)
    reading.looks.put()


def urls(source: UrlList, store: Store, part: Range) -> Iterator[tuple[int, str | Rejection]]:
    for number, row in parquet.rows(source, store, part, [source.image], NAME_BATCH):
        yield number, row if isinstance(row, Rejection) else _url(fields.field(row, source.image))


# One item


class _Reading:
    """A piece of a table while it is read."""

    def __init__(self, source: TableSource, store: Store, part: Range) -> None:
        self.source, self.table = source, part.input
        self.folder = folder = open_folder(source.url)
        self.files = Files(source.files) if isinstance(source, ParquetImages) and source.files is not None else None
        reads = self.files is not None or isinstance(source, TableFolder)
        where = named.place(source.name, folder, part.input) if reads else ""
        self.looks = looked.Looks(store, where, part)

    def lost(self, number: int, why: Rejection) -> RawItem:
        """A row of which nobody knows what stood in it."""
        source, place = self.source, f"{self.table}#{number}"
        key = sample_key(source.name, f"\0{place}")
        kept = dict.fromkeys(source.keep)
        return RawItem(number, key, words.shown(place), why, [], source.licence, source.origin, kept)

    def item(self, number: int, row: dict[str, Any]) -> RawItem:
        source, place = self.source, f"{self.table}#{number}"
        said = [(kind, fields.listed(fields.field(row, kind))) for kind in source.captions]
        captions = words.captions(said, source.max_caption)
        name, identity, image = self._image(number, row, place)
        if not isinstance(image, Rejection):
            if isinstance(captions, Rejection):
                image = captions
            elif source.captions and not captions:
                image = Rejection(Cause.NO_CAPTION)
            elif image is None:
                image = self.looks.read(self.folder, number, name, source.max_bytes)
        own = None if isinstance(source, UrlList) else source.origin_column
        licence, origin = (fields.field(row, column) if column else None for column in (source.licence_column, own))
        return RawItem(
            row=number,
            key=sample_key(source.name, identity or f"\0{place}"),
            name=words.shown(name),
            image=image,
            captions=[] if isinstance(captions, Rejection) else captions,
            licence=words.or_else(licence, source.licence),
            origin=words.shown(name) if isinstance(source, UrlList) else words.or_else(origin, source.origin),
            kept={column: words.kept(fields.field(row, column)) for column in source.keep},
        )

    def _image(self, number: int, row: dict[str, Any], place: str) -> _Image:
        source = self.source
        value = fields.field(row, source.image)
        if isinstance(source, ParquetImages):
            return self._embedded(number, value, place)
        name = words.text(value) or ""
        if isinstance(source, UrlList):
            name, found = name.strip(), _url(value)
            return _Image(name, _plain(name), found)
        return _Image(name, _plain(name), None if name else Rejection(Cause.BAD_NAME, "empty or not UTF-8"))

    def _embedded(self, number: int, value: Any, place: str) -> _Image:
        path, limit = None, self.source.max_bytes
        if isinstance(value, dict):
            value, path = value["bytes"], words.text(value.get("path"))
        name = path or place
        if value is None and path and self.files is not None:
            value = self.looks.read(self.files.folder, number, self.files.inside(path), limit)
            if isinstance(value, Rejection):
                return _Image(name, None, value)
        if value is None:
            return _Image(name, None, Rejection(Cause.MISSING, "the row holds no bytes"))
        if len(value) > limit:
            return _Image(name, None, Rejection(Cause.TOO_MANY_BYTES, f"{len(value)} bytes"))
        return _Image(name, hashlib.sha256(value).hexdigest(), value)


class _Image(NamedTuple):
    name: str
    identity: str | None  # what tells it from all others, wherever a row names it; never with a NUL in front
    image: bytes | Url | Rejection | None  # None: to be read by its name


def _plain(name: str) -> str | None:
    """No URL and no file begins with a NUL; who writes one means a place, to be taken for another row."""
    return name if name and not name.startswith("\0") else None


def _url(value: bytes | str | None) -> Url | Rejection:
    name = words.text(value)
    if not name or not name.strip():
        return Rejection(Cause.BAD_URL, "empty or not UTF-8")
    found = http_url(name.strip())
    return found if isinstance(found, Rejection) else Url(found.text)


# Columns


def _columns(source: TableSource) -> Columns:
    image = [source.image] if isinstance(source, ParquetImages) else []
    return Columns(image, source.texts(), source.captions, source.keep)


def _check(source: TableSource, name: str, schema: pa.Schema) -> None:
    check_columns(_columns(source), name, schema)
    if isinstance(source, ParquetImages):
        kind = fields.kind_of(schema, source.image)
        assert kind is not None, "the columns were checked"
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not parquet.is_bytes(inner) and not pa.types.is_null(inner):
            raise SettingsError(
                f"column `{source.image}` of {name} is {kind}",
                remedy="name a column of bytes, or of {bytes, path}; of a list of images, one: images.0",
            )
        if source.files is not None and (inner is kind or kind.get_field_index("path") < 0):
            raise SettingsError(f"column `{source.image}` of {name} has no paths", remedy="leave `files` out")


def check_columns(columns: Columns, name: str, schema: pa.Schema) -> None:
    for column in columns.names:
        start = fields.top(schema.names, column)
        if not start:
            raise missing_column(name, column, schema.names)
        if schema.names.count(start) > 1:
            raise SettingsError(f"{name} has two columns `{start}`", remedy="rename one of them")
        if fields.kind_of(schema, column) is None:
            there = [leaf for leaf, _ in fields.leaves(schema.field(start).type, start)]
            raise missing_column(name, column, there)
    for column in [*columns.texts, *columns.captions]:
        kind = fields.kind_of(schema, column)
        inner = fields.element(kind) if column in columns.captions else kind
        if column in columns.captions and pa.types.is_struct(inner):
            _check_texts(name, column, inner)
        elif not parquet.is_text(inner):
            raise SettingsError(f"column `{column}` of {name} is {kind}, not text", remedy="name a column of text")
    for column in columns.kept:
        check_kept(column)
        kind = fields.kind_of(schema, column)
        if parquet.plain_type(kind) is None:
            raise SettingsError(
                f"column `{column}` of {name} is {kind}", remedy="keep columns of numbers, booleans and texts"
            )


def _check_texts(name: str, column: str, kind: pa.DataType) -> None:
    """A struct may be named whole if all that is in it is text."""
    there = list(fields.leaves(kind, column))
    if not all(parquet.is_text(fields.element(inner)) for _, inner in there):
        texts = [leaf for leaf, inner in there if parquet.is_text(fields.element(inner))]
        raise SettingsError(
            f"column `{column}` of {name} is {kind}, not text alone",
            remedy=f"name what is text in it: {', '.join(texts) or 'nothing is'}",
        )


# Identity


def measured(folder: Folder, name: str) -> Input:
    with folder.open(name) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return Input(name, file.tell(), sha256)


def _image_names(
    source: TableFolder | ParquetImages, folder: Folder, table: str, files: Files | None
) -> Iterator[list[bytes | None]]:
    """What the rows name, batch by batch; None for those that name nothing, or that cannot be read."""
    if not is_parquet(table):
        yield from _names_in_lines(source, folder, table)
        return
    with parquet.opened(folder.open(table), table) as file:
        if not file.metadata.num_rows:
            return
        _check(source, table, file.schema_arrow)
        column = source.image if files is None else f"{source.image}.path"
        for batch in parquet.batches(file, table, [column], NAME_BATCH):
            if isinstance(batch, parquet.Lost):
                yield [None] * batch.rows
                continue
            names = [name if isinstance(name, bytes) else None for name in parquet.values(batch, column)]
            yield names if files is None else [name and _inside(files, name) for name in names]


def _inside(files: Files, name: bytes) -> bytes:
    return files.inside(name.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _names_in_lines(source: Tables, folder: Folder, table: str) -> Iterator[list[bytes | None]]:
    held: list[bytes | None] = []
    for line in lines(folder, table, source.header):
        value = None if isinstance(line, Rejection) else fields.field(line, source.image)
        held.append(value.encode(errors="surrogatepass") if isinstance(value, str) else None)
        if len(held) == NAME_BATCH:
            yield held
            held = []
    yield held

"""Corpora whose items are the rows of tables: the images are in a folder, on the web, or in the tables themselves.

A table is identified by the sha256 of its file. If its rows name images of a folder, it covers the sizes of these
images too, so that one that is added, removed or changes its size is noticed, and so are images that were replaced by
others of the same size (see `checksums`). A Parquet that holds the images may be as large as the corpus: it is
identified by its size, head and tail, which holds the offsets and lengths of all columns. CSV and JSON tables are
converted to Parquet when they are planned.

A setting names a column by its name or by a path into its values: `captions.short`, `sentences.raw`.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Rejection
from data_prep.sources import checksums, fields, parquet, table_identity, words
from data_prep.sources.base import Input, Range, RawItem, Rows, Source, Url, check_kept, foreign, missing_column
from data_prep.sources.convert import Columns, converted
from data_prep.sources.folders import Folder, matching, open_folder
from data_prep.sources.lines import is_parquet, kind_of, lines
from data_prep.sources.reading import chunks
from infra.config import operational
from infra.errors import SettingsError
from infra.shards import sample_key
from infra.store import Store

READERS = 8  # tables hashed at once
NAME_BATCH = 10_000  # rows of which only the image's name is read


class Picture(NamedTuple):
    """A row's image."""

    name: str
    identity: str | None  # a path, URL or hash, the same in every row with this image; None: the row itself
    image: bytes | Url | Rejection | None  # None: it must be read by its name


class Beside(NamedTuple):
    """The folder that holds a table's images."""

    folder: Folder
    column: str  # the path of the column that names them
    root: str = ""  # removed from the front of absolute names

    def inside(self, name: str) -> str:
        return name.removeprefix(f"{self.root}/") if self.root else name


class Tables(Source):
    # Operational, since a plan records its inputs: another table extends the plan and makes no other one.
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

    batch: ClassVar[int] = parquet.BATCH  # rows in memory at once
    parquet_only: ClassVar[bool] = False  # its rows hold bytes, which CSV and JSON cannot

    @abstractmethod
    def picture(self, number: int, row: dict[str, Any], place: str, reading: Reading) -> Picture:
        """A row's image; one without a name is called `place`."""

    @abstractmethod
    def origin_of(self, row: dict[str, Any], name: str) -> str:
        """Where a row's image comes from."""

    def texts(self) -> list[str]:
        """The columns whose values are one text each."""
        return [self.image, *([self.licence_column] if self.licence_column else [])]

    def beside(self, folder: Folder) -> Beside | None:
        """The folder of the images that rows name; None if they are in the tables or on the web."""
        return None

    def columns(self) -> Columns:
        """All columns that are read."""
        return Columns([], self.texts(), self.captions, self.keep)

    def check(self, name: str, schema: pa.Schema) -> None:
        """Refuse a table without the columns that are read, or with other types than they must have."""
        check_columns(self.columns(), name, schema)

    def identity(self, folder: Folder, name: str) -> Input:
        """The table with its identity, which does not cover images that it names."""
        return measured(folder, name)

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        folder = open_folder(self.url)
        names = matching(folder, self.tables, "tables")
        for name in names:
            if not kind_of(name) and (remedy := foreign(name)):
                raise SettingsError(f"{name} is no table", remedy=remedy)
            if self.header and kind_of(name) not in (".csv", ".tsv"):
                raise SettingsError(
                    f"{name} names its columns itself", remedy="leave `header` out, or make another source of it"
                )
        with ThreadPoolExecutor(READERS) as pool:
            tables = list(pool.map(lambda name: self.identity(folder, name), names))
        beside = self.beside(folder)
        if beside is None:
            return tables
        sizes = table_identity.Sizes(beside.folder)
        return [
            table_identity.with_images(
                table,
                partial(_image_names, self, folder, table.name, beside),
                sizes,
                beside.folder,
                self.max_bytes,
                (store, table_identity.corpus_id(self.name, folder, table.name)) if store else None,
            )
            for table in tables
        ]

    def ranges(self, store: Store, entry: Input, rows: int) -> Iterator[Range]:
        folder, name = open_folder(self.url), entry.name
        if is_parquet(name):
            with parquet.opened(folder.open(name), name) as file:
                if not file.metadata.num_rows:
                    return
                self.check(name, file.schema_arrow)
                groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            table, in_store = name, False
        else:
            if self.parquet_only:
                raise SettingsError(f"{name} is no Parquet file", remedy="name tables that end in .parquet")
            for column in self.keep:
                check_kept(column)
            stored = converted(store, self.name, folder, name, self.columns(), self.header)
            if stored is None:
                return
            groups, table, in_store = [stored[1]], stored[0].key, True
            with parquet.opened(parquet.open_rows(self, store, Rows(name, table, True, 0, 0)), table) as file:
                self.check(name, file.schema_arrow)
        # A row group is read from its start, which costs much if it holds images: ranges begin with one where they can.
        for first, count in cuts(groups if self.parquet_only else [sum(groups)], rows):
            yield Rows(name, table, in_store, first, count)

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        return dict.fromkeys(self.keep)

    def kept_fields(self, store: Store, part: Range) -> list[pa.Field]:
        return parquet.kept_fields(self, store, part, self.keep)

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Rows)
        reading = Reading(self, store, part)
        for number, row in parquet.rows(self, store, part, self.columns().names, self.batch):
            yield reading.lost(number, row) if isinstance(row, Rejection) else reading.item(number, row)
        reading.files.write()


class PictureTables(Tables):
    """Tables whose images are in the corpus: nothing is downloaded."""

    origin_column: str | None = None

    def texts(self) -> list[str]:
        return [*super().texts(), *([self.origin_column] if self.origin_column else [])]

    def origin_of(self, row: dict[str, Any], name: str) -> str:
        return words.or_else(fields.field(row, self.origin_column) if self.origin_column else None, self.origin)


class Reading:
    """Makes items of the rows of one range."""

    def __init__(self, source: Tables, store: Store, part: Rows) -> None:
        self.source, self.table = source, part.input
        folder = open_folder(source.url)
        self.beside = source.beside(folder)
        corpus = table_identity.corpus_id(source.name, folder, part.input) if self.beside else ""
        self.files = checksums.Recorder(store, corpus, part)

    def read(self, number: int, name: str) -> bytes | Rejection:
        """The image file that a row names."""
        assert self.beside is not None
        return self.files.read(self.beside.folder, number, self.beside.inside(name), self.source.max_bytes)

    def lost(self, number: int, why: Rejection) -> RawItem:
        """The item of a row that cannot be read."""
        source, place = self.source, f"{self.table}#{number}"
        key = sample_key(source.name, f"\0{place}")
        kept = dict.fromkeys(source.keep)
        return RawItem(number, key, words.shown(place), why, [], source.licence, source.origin, kept)

    def item(self, number: int, row: dict[str, Any]) -> RawItem:
        source, place = self.source, f"{self.table}#{number}"
        values = [(kind, fields.listed(fields.field(row, kind))) for kind in source.captions]
        texts = words.captions(values, source.max_caption)
        name, identity, image = source.picture(number, row, place, self)
        image, captions = words.image_and_captions(image, texts)
        if image is None:
            image = self.read(number, name)
        licence = fields.field(row, source.licence_column) if source.licence_column else None
        return RawItem(
            row=number,
            key=sample_key(source.name, identity or f"\0{place}"),
            name=words.shown(name),
            image=image,
            captions=captions,
            licence=words.or_else(licence, source.licence),
            origin=source.origin_of(row, name),
            kept={column: words.kept(fields.field(row, column)) for column in source.keep},
        )


def plain_name(name: str) -> str | None:
    """A name as an image's identity, if it can be one. A NUL in front is refused, as it marks the identity of a row."""
    return name if name and not name.startswith("\0") else None


def cuts(groups: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """The first row and the length of each range: small row groups are joined up to `rows`, large ones cut.

    `cuts([3, 4, 25], 10)` gives (0, 7), (7, 10), (17, 10), (27, 5).
    """
    first, length = 0, 0
    for count in groups:
        if length and length + count > rows:
            yield first, length
            first, length = first + length, 0
        length += count
        while length >= rows:
            yield first, rows
            first, length = first + rows, length - rows
    if length:
        yield first, length


def check_columns(columns: Columns, name: str, schema: pa.Schema) -> None:
    for column in columns.names:
        start = fields.top(schema.names, column)
        if not start:
            raise missing_column(name, column, schema.names)
        if schema.names.count(start) > 1:
            raise SettingsError(f"{name} has two columns `{start}`", remedy="rename one of them")
        if fields.kind_of(schema, column) is None:
            leaves = [leaf for leaf, _ in fields.leaves(schema.field(start).type, start)]
            raise missing_column(name, column, leaves)
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
    """A struct may be a caption column only if all of its fields are texts."""
    leaves = [(leaf, parquet.is_text(fields.element(inner))) for leaf, inner in fields.leaves(kind, column)]
    if not all(is_text for _, is_text in leaves):
        texts = [leaf for leaf, is_text in leaves if is_text]
        raise SettingsError(
            f"column `{column}` of {name} is {kind}, not text alone",
            remedy=f"name what is text in it: {', '.join(texts) or 'nothing is'}",
        )


def measured(folder: Folder, name: str) -> Input:
    with folder.open(name) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return Input(name, file.tell(), sha256)


def _image_names(source: Tables, folder: Folder, table: str, beside: Beside) -> Iterator[list[bytes | None]]:
    """The image names of all rows, batch by batch; None for a row without one, or that cannot be read."""
    if not is_parquet(table):
        values = (
            None if isinstance(line, Rejection) else fields.field(line, source.image)
            for line in lines(folder, table, source.header)
        )
        texts = (value.encode(errors="surrogatepass") if isinstance(value, str) else None for value in values)
        yield from chunks(texts, NAME_BATCH)
        return
    with parquet.opened(folder.open(table), table) as file:
        if not file.metadata.num_rows:
            return
        source.check(table, file.schema_arrow)
        for batch in parquet.batches(file, table, [beside.column], NAME_BATCH):
            if isinstance(batch, parquet.Lost):
                yield [None] * batch.rows
                continue
            names = [name if isinstance(name, bytes) else None for name in parquet.values(batch, beside.column)]
            yield [name and _inside(beside, name) for name in names] if beside.root else names


def _inside(beside: Beside, name: bytes) -> bytes:
    return beside.inside(name.decode(errors="surrogateescape")).encode(errors="surrogateescape")

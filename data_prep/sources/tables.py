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
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import fields, looked, named, parquet, words
from data_prep.sources.base import Input, Range, RawItem, Rows, Source, Url, check_kept, foreign, missing_column
from data_prep.sources.convert import Columns, converted
from data_prep.sources.folders import Folder, matching, open_folder
from data_prep.sources.lines import is_parquet, kind_of, lines
from infra.config import operational
from infra.errors import SettingsError
from infra.shards import sample_key
from infra.store import Store

READERS = 8  # files measured at once
NAME_BATCH = 10_000


class Picture(NamedTuple):
    """What a row says of its picture."""

    name: str
    identity: str | None  # what tells it from all others, wherever a row names it; never with a NUL in front
    image: bytes | Url | Rejection | None  # None: to be read by its name


class Beside(NamedTuple):
    """The folder of the pictures that rows name, the column that names them, and what is cut off in front."""

    folder: Folder
    column: str
    root: str = ""

    def inside(self, name: str) -> str:
        return name.removeprefix(f"{self.root}/") if self.root else name


class Tables(Source):
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

    batch: ClassVar[int] = parquet.BATCH  # rows in memory at once
    parquet_only: ClassVar[bool] = False  # its rows hold what no table of text can hold

    @abstractmethod
    def picture(self, number: int, row: dict[str, Any], place: str, reading: Reading) -> Picture:
        """What a row says of its picture; `place` is what a row is called that gives it no name."""

    @abstractmethod
    def origin_of(self, row: dict[str, Any], name: str) -> str:
        """Where a row's picture comes from."""

    def texts(self) -> list[str]:
        """The columns that hold a text each."""
        return [self.image, *([self.licence_column] if self.licence_column else [])]

    def beside(self, folder: Folder) -> Beside | None:
        """Where the pictures lie that rows name; None where a table holds all that there is."""
        return None

    def columns(self) -> Columns:
        """All that is read of a table."""
        return Columns([], self.texts(), self.captions, self.keep)

    def check(self, name: str, schema: pa.Schema) -> None:
        """Refuse a table that has not what is read of it."""
        check_columns(self.columns(), name, schema)

    def identity(self, folder: Folder, name: str) -> Input:
        """The table by what it holds."""
        return measured(folder, name)

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        folder = open_folder(self.url)
        names = matching(folder, self.tables, "tables")
        for name in names:
            if not kind_of(name) and (what := foreign(name)):
                raise SettingsError(f"{name} is no table", remedy=what)
            if self.header and kind_of(name) not in (".csv", ".tsv"):
                raise SettingsError(
                    f"{name} names its columns itself", remedy="leave `header` out, or make another source of it"
                )
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(lambda name: self.identity(folder, name), names))
        beside = self.beside(folder)
        if beside is None:
            return found
        sizes = named.Sizes(beside.folder)
        return [
            named.with_images(
                table,
                partial(_image_names, self, folder, table.name, beside),
                sizes,
                beside.folder,
                self.max_bytes,
                (store, named.place(self.name, folder, table.name)) if store else None,
            )
            for table in found
        ]

    def ranges(self, store: Store, found: Input, rows: int) -> Iterator[Range]:
        folder, name = open_folder(self.url), found.name
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
            made = converted(store, self.name, folder, name, self.columns(), self.header)
            if made is None:
                return
            where, count = made
            groups, table, in_store = [count], where.key, True
            with parquet.opened(parquet.open_rows(self, store, Rows(name, table, True, 0, 0)), table) as file:
                self.check(name, file.schema_arrow)
        # A row group with images is read from its beginning, so cuts between groups are cheapest.
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
        reading.looks.put()


class PictureTables(Tables):
    """Tables of pictures that are there already."""

    origin_column: str | None = None

    def texts(self) -> list[str]:
        return [*super().texts(), *([self.origin_column] if self.origin_column else [])]

    def origin_of(self, row: dict[str, Any], name: str) -> str:
        return words.or_else(fields.field(row, self.origin_column) if self.origin_column else None, self.origin)


class Reading:
    """A piece of a table while it is read."""

    def __init__(self, source: Tables, store: Store, part: Rows) -> None:
        self.source, self.table = source, part.input
        folder = open_folder(source.url)
        self.beside = source.beside(folder)
        self.looks = looked.Looks(store, named.place(source.name, folder, part.input) if self.beside else "", part)

    def look(self, number: int, name: str) -> bytes | Rejection:
        """The picture that a row names."""
        assert self.beside is not None
        return self.looks.read(self.beside.folder, number, self.beside.inside(name), self.source.max_bytes)

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
        name, identity, image = source.picture(number, row, place, self)
        if not isinstance(image, Rejection):
            if isinstance(captions, Rejection):
                image = captions
            elif source.captions and not captions:
                image = Rejection(Cause.NO_CAPTION)
            elif image is None:
                image = self.look(number, name)
        licence = fields.field(row, source.licence_column) if source.licence_column else None
        return RawItem(
            row=number,
            key=sample_key(source.name, identity or f"\0{place}"),
            name=words.shown(name),
            image=image,
            captions=[] if isinstance(captions, Rejection) else captions,
            licence=words.or_else(licence, source.licence),
            origin=source.origin_of(row, name),
            kept={column: words.kept(fields.field(row, column)) for column in source.keep},
        )


def plain_name(name: str) -> str | None:
    """No URL and no file begins with a NUL; who writes one means a place, to be taken for another row."""
    return name if name and not name.startswith("\0") else None


def cuts(groups: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
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


def measured(folder: Folder, name: str) -> Input:
    with folder.open(name) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return Input(name, file.tell(), sha256)


def _image_names(source: Tables, folder: Folder, table: str, beside: Beside) -> Iterator[list[bytes | None]]:
    """What the rows name, batch by batch; None for those that name nothing, or that cannot be read."""
    if not is_parquet(table):
        yield from _names_in_lines(source, folder, table)
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


def _names_in_lines(source: Tables, folder: Folder, table: str) -> Iterator[list[bytes | None]]:
    held: list[bytes | None] = []
    for line in lines(folder, table, source.header):
        value = None if isinstance(line, Rejection) else fields.field(line, source.image)
        held.append(value.encode(errors="surrogatepass") if isinstance(value, str) else None)
        if len(held) == NAME_BATCH:
            yield held
            held = []
    yield held

"""SA-1B and corpora like it: tars of images, whose captions are in tables by image id.

The caption tables are inputs without items. They are joined into one table in the store, sorted by id, which the ranges
of a tar name; a task reads from it only the few row groups that hold its images' ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from data_prep.sources import parquet, tables, tars, words
from data_prep.sources.base import Bytes, Input, Range, RawItem
from data_prep.sources.convert import Columns
from data_prep.sources.folders import matching, open_folder
from data_prep.sources.joined import Captions, join
from infra.store import Store


class Sa1b(tars.Tars):
    kind: Literal["sa1b"]
    joins_tables: ClassVar[bool] = True
    tables: list[str] = Field(min_length=1, description="tables of captions in the folder: paths, or patterns")
    image: str = Field("image_id", description="the column of ids: 223750, sa_223750 or sa_223750.jpg")
    captions: list[str] = Field(["caption"], min_length=1, description="columns of text, or of lists of texts")
    keep: list[str] = Field([], description="further columns to carry into the index, to filter by")
    licence_column: str | None = None
    origin_column: str | None = None

    @model_validator(mode="after")
    def _either(self) -> Sa1b:
        if twice := set(self.keep) & {self.image, *self.columns().texts, *self.captions}:
            raise ValueError(f"the column `{min(twice)}` is read for what it says, and not kept beside it")
        return self

    def columns(self) -> Columns:
        texts = [column for column in (self.licence_column, self.origin_column) if column]
        return Columns([self.image], texts, self.captions, self.keep)

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        folder = open_folder(self.url)
        captions = [tables.measured(folder, name) for name in matching(folder, self.tables, "tables")]
        return [*captions, *super().inputs()]

    def ranges(self, store: Store, entry: Input, rows: int) -> Iterator[Range]:
        folder = open_folder(self.url)
        names = matching(folder, self.tables, "tables")
        if entry.name in names:
            return
        table = join(store, self.name, folder, names, self.columns())
        for first, size in self.pieces(store, entry, rows):
            yield Bytes(entry.name, table, True, first, size)

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        return dict.fromkeys(self.keep)

    def kept_fields(self, store: Store, part: Range) -> list[pa.Field]:
        return parquet.kept_fields(self, store, part, self.keep)

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Bytes)
        with tars.opened(self, store, part) as file, parquet.open_rows(self, store, part) as table:
            captions = Captions(table, part.table)
            for tar_item in tars.items(self, part, file, ()):
                yield _item(self, captions, tar_item)


def _item(source: Sa1b, table: Captions, tar_item: tars.TarItem) -> RawItem:
    row = table.of(tar_item.sample.base) or {}
    texts = words.captions([(kind, row.get(kind)) for kind in source.captions], source.max_caption)
    licence, origin = row.get(source.licence_column or ""), row.get(source.origin_column or "")
    return source.item(tar_item, texts, licence, origin, {name: words.kept(row.get(name)) for name in source.keep})

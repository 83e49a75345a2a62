"""SA-1B and what is made like it: tars of images, with captions that come from a table by the image's id.

The caption tables are inputs of their own without samples; what is planned for a tar names the captions' join: all
their rows by id, in the store. A task reads from it the few row groups that its tar's ids fall into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from data_prep.rejections import Cause, Rejection
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
        found = [tables.measured(folder, name) for name in matching(folder, self.tables, "tables")]
        return [*found, *super().inputs()]

    def ranges(self, store: Store, found: Input, rows: int) -> Iterator[Range]:
        folder = open_folder(self.url)
        names = matching(folder, self.tables, "tables")
        if found.name in names:
            return
        table = join(store, self.name, folder, names, self.columns())
        for first, size in self.pieces(store, found, rows):
            yield Bytes(found.name, table, True, first, size)

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        return dict.fromkeys(self.keep)

    def kept_fields(self, store: Store, part: Range) -> list[pa.Field]:
        return parquet.kept_fields(self, store, part, self.keep)

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Bytes)
        with tars.opened(self, store, part) as file, parquet.open_rows(self, store, part) as table:
            said = Captions(table, part.table)
            for found in tars.found(self, part, file, ()):
                yield _item(self, said, found)


def _item(source: Sa1b, said: Captions, found: tars.Found) -> RawItem:
    row = said.of(found.sample.base) or {}
    captions = words.captions([(kind, row.get(kind)) for kind in source.captions], source.max_caption)
    image = found.image
    if not isinstance(image, Rejection):
        image = captions if isinstance(captions, Rejection) else image if captions else Rejection(Cause.NO_CAPTION)
    return RawItem(
        row=found.row,
        key=found.key,
        name=found.shown,
        image=image,
        captions=[] if isinstance(captions, Rejection) else captions,
        licence=words.or_else(row.get(source.licence_column or ""), source.licence),
        origin=words.or_else(row.get(source.origin_column or ""), source.origin),
        kept={column: words.kept(row.get(column)) for column in source.keep},
    )

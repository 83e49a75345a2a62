"""Corpora -> one stream of raw items.

A source is a settings class with a `kind`, in the module of its family, and functions behind it:

    inputs(source, store, planned)       what it is made of, by name, size and hash: what a plan's digest is made of
    ranges(source, store, found, rows)   an input cut into pieces of about `rows` rows, each the work of one task
    kept_fields(source, store, part)     the columns that it adds to the index
    kept_columns(source)                 the same, as far as its settings tell
    items(source, store, part)           the raw items of a piece, each with its bytes, its URL or a Rejection
    urls(source, store, part)            of a list of URLs: these alone

    tables        table_folder, url_list, parquet_images      a row is an item
    listings      text_folder, imagenet                       a file is an item
    web_dataset   webdataset                                  a sample in a tar is an item
    sa1b          sa1b                                        the same, its words in a table

Behind these: `lines` reads tables of text and `convert` turns them into Parquet, `parquet` reads that, `named` and
`looked` tell whether files are what they were, `tars` and `tarwalk` read tars, `unpacked` unpacks them.

A key is made of what an item is: its URL, its name in the folder or tar, or its bytes where a table holds them. Where
there is none of these it is its place, which nothing else is called. So neither rows that come before it nor another
name for its table move it, and a picture that is named in two pieces has one key in both: whoever forgets it forgets
all of them. Within a piece keys are distinct, as members of a tar must be: one that comes again gets a key of its own,
which begins as the first does and stays on its side of the held-out split.

Everything is read in a stream, and everything comes from strangers: a name never leads out of its folder, a caption is
text of bounded length, and what cannot be read is an item with a cause, never an exception and never left out. Only a
table that is no table at all is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Annotated

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Rejection
from data_prep.sources import listings, sa1b, tables, web_dataset
from data_prep.sources.listings import ImageNet, TextFolder
from data_prep.sources.raw import ROW, Input, Keys, Range, RawItem, Url
from data_prep.sources.sa1b import Sa1b
from data_prep.sources.tables import ParquetImages, TableFolder, UrlList
from data_prep.sources.web_dataset import WebDataset
from infra.store import Store

__all__ = [
    "ROW",
    "ImageNet",
    "Input",
    "ParquetImages",
    "Range",
    "RawItem",
    "Sa1b",
    "Source",
    "TableFolder",
    "TextFolder",
    "Url",
    "UrlList",
    "WebDataset",
    "inputs",
    "items",
    "kept_columns",
    "kept_fields",
    "ranges",
    "urls",
]

Source = Annotated[
    TableFolder | TextFolder | UrlList | WebDataset | ParquetImages | ImageNet | Sa1b, Field(discriminator="kind")
]

_FAMILY: dict[str, ModuleType] = {
    "table_folder": tables,
    "url_list": tables,
    "parquet_images": tables,
    "text_folder": listings,
    "imagenet": listings,
    "webdataset": web_dataset,
    "sa1b": sa1b,
}


def inputs(source: Source, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
    """Every input and its identity. A folder's listing goes to the store; without one, identities are all that is told.

    `planned` are the pieces of an earlier plan: a folder that has only grown is its old listings and one of the rest.
    """
    found: list[Input] = _FAMILY[source.kind].inputs(source, store, planned)
    return found


def ranges(source: Source, store: Store, found: Input, rows: int) -> Iterator[Range]:
    """The input in pieces that cover it once, in order. Tables that are not Parquet are written to the store as such.

    An input may have no items of its own (captions for other inputs); then there are no pieces.
    """
    return iter(_FAMILY[source.kind].ranges(source, store, found, rows))


def kept_fields(source: Source, store: Store, part: Range) -> list[pa.Field]:
    """The columns that the source adds to the index, in its order."""
    found: list[pa.Field] = _FAMILY[source.kind].kept_fields(source, store, part)
    return found


def kept_columns(source: Source) -> dict[str, pa.DataType | None]:
    """The same as far as the settings tell: a table's types are known once it is read."""
    found: dict[str, pa.DataType | None] = _FAMILY[source.kind].kept_columns(source)
    return found


def items(source: Source, store: Store, part: Range) -> Iterator[RawItem]:
    """Every input of the piece, in order, each an item whatever became of it."""
    keys = Keys()
    for item in _FAMILY[source.kind].items(source, store, part):
        yield item._replace(key=keys.distinct(item.key))


def urls(source: UrlList, store: Store, part: Range) -> Iterator[tuple[int, str | Rejection]]:
    """The piece's URLs with their rows, read from their column alone."""
    return tables.urls(source, store, part)

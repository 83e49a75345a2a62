"""Corpora -> one stream of raw items.

A kind of source is a class in a file of its own (`base` says what it must do):

    table_folder, url_list, parquet_images    on `tables`: a row is an item
    text_folder, imagenet                     on `listings`: a file is an item
    webdataset, sa1b                          on `tars`: a sample in a tar is an item; sa1b's words stand in a table

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

from typing import Annotated

from pydantic import Field

from data_prep.sources.base import ROW, Bytes, Input, Keys, Range, RawItem, Rows, Source, Url, UrlSource
from data_prep.sources.imagenet import ImageNet
from data_prep.sources.parquet_images import ParquetImages
from data_prep.sources.sa1b import Sa1b
from data_prep.sources.table_folder import TableFolder
from data_prep.sources.text_folder import TextFolder
from data_prep.sources.url_list import UrlList
from data_prep.sources.webdataset import WebDataset

__all__ = [
    "ROW",
    "AnySource",
    "Bytes",
    "ImageNet",
    "Input",
    "Keys",
    "ParquetImages",
    "Range",
    "RawItem",
    "Rows",
    "Sa1b",
    "Source",
    "TableFolder",
    "TextFolder",
    "Url",
    "UrlList",
    "UrlSource",
    "WebDataset",
]

AnySource = Annotated[
    TableFolder | TextFolder | UrlList | WebDataset | ParquetImages | ImageNet | Sa1b, Field(discriminator="kind")
]

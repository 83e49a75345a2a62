"""Corpora -> one stream of raw items.

A kind of source is a class in a file of its own (`base` says what it must do):

    table_folder, url_list, parquet_images    on `tables`: a row is an item
    text_folder, imagenet                     on `listings`: a file is an item
    webdataset, sa1b                          on `tars`: a sample in a tar is an item; sa1b's captions are in tables

Behind these: `lines` reads CSV and JSON tables, `convert` writes them as Parquet and `parquet` reads that; `checksums`
and `table_identity` find replaced files; `tars` and `tarwalk` read tars, and `unpacked` unpacks compressed ones.

An item's key is a hash of what identifies the image: its URL, its name in the folder or tar or, where a table holds the
images themselves, its bytes. An item without any of these is identified by its table and row. So inserting rows or
renaming a table does not change the keys of identified items, and an image that appears in two ranges has the same key
in both: forgetting that key forgets every copy. Within one range, which becomes the members of one tar, keys must
differ: a repeated image gets a key of its own with the first one's leading digits, which decide the held-out split.

Everything is streamed, and no input is trusted: a name never leads out of its folder, a caption is text of bounded
length, and an input that cannot be read becomes an item with a cause; it is neither skipped nor an exception. Only a
file that is not a table at all is an error.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data_prep.sources.base import ROW, Bytes, Input, Range, RawItem, Rows, Source, Url, UrlSource
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

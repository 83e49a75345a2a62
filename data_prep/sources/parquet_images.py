"""Parquet tables that hold the images in a column."""

from __future__ import annotations

import hashlib
import os
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import fields, parquet, words
from data_prep.sources.base import Input
from data_prep.sources.convert import Columns
from data_prep.sources.folders import Folder, fingerprint, open_folder
from data_prep.sources.tables import Beside, Picture, PictureTables, Reading
from infra.config import operational
from infra.errors import SettingsError


class ParquetImages(PictureTables):
    """Images in a column of Parquet tables: plain bytes, or the {bytes, path} pairs that Hugging Face writes.

    No more of a table is in memory than the images of a few rows and the pages that they are in.
    """

    kind: Literal["parquet_images"]
    image: str = Field("image", description="the column of images")
    # Operational, since a key is a hash of the image's bytes, wherever these are read from.
    files: str | None = operational(
        None, description="the folder of the pictures of which a row holds the path alone, and no bytes"
    )

    batch: ClassVar[int] = 8  # rows whose images are in memory at once
    parquet_only: ClassVar[bool] = True

    def texts(self) -> list[str]:
        return [column for column in super().texts() if column != self.image]

    def columns(self) -> Columns:
        return super().columns()._replace(subject=[self.image])

    def identity(self, folder: Folder, name: str) -> Input:
        return Input(name, *fingerprint(folder, name))

    def beside(self, folder: Folder) -> Beside | None:
        """Absolute paths must lead into the folder `files`."""
        if self.files is None:
            return None
        root = os.path.abspath(self.files.removeprefix("file://"))
        return Beside(open_folder(self.files), f"{self.image}.path", root)

    def check(self, name: str, schema: pa.Schema) -> None:
        super().check(name, schema)
        kind = fields.kind_of(schema, self.image)
        assert kind is not None, "the columns were checked"
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not parquet.is_bytes(inner) and not pa.types.is_null(inner):
            raise SettingsError(
                f"column `{self.image}` of {name} is {kind}",
                remedy="name a column of bytes, or of {bytes, path}; of a list of images, one: images.0",
            )
        if self.files is not None and (inner is kind or kind.get_field_index("path") < 0):
            raise SettingsError(f"column `{self.image}` of {name} has no paths", remedy="leave `files` out")

    def picture(self, number: int, row: dict[str, Any], place: str, reading: Reading) -> Picture:
        value, path = fields.field(row, self.image), None
        if isinstance(value, dict):
            value, path = value["bytes"], words.text(value.get("path"))
        name = path or place
        if value is None and path and self.files is not None:
            value = reading.read(number, path)
            if isinstance(value, Rejection):
                return Picture(name, None, value)
        if value is None:
            return Picture(name, None, Rejection(Cause.MISSING, "the row holds no bytes"))
        if len(value) > self.max_bytes:
            return Picture(name, None, Rejection(Cause.TOO_MANY_BYTES, f"{len(value)} bytes"))
        return Picture(name, hashlib.sha256(value).hexdigest(), value)

"""A folder of images with tables whose rows name them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import fields, words
from data_prep.sources.folders import Folder
from data_prep.sources.tables import Beside, Picture, PictureTables, Reading, plain_name


class TableFolder(PictureTables):
    """Images in a folder, named by the rows of tables in it: Parquet, JSON lines or arrays, CSV or TSV."""

    kind: Literal["table_folder"]
    image: str = Field("image", description="the column that names the image, relative to the folder")

    def beside(self, folder: Folder) -> Beside:
        return Beside(folder, self.image)

    def picture(self, number: int, row: dict[str, Any], place: str, reading: Reading) -> Picture:
        name = words.text(fields.field(row, self.image)) or ""
        return Picture(name, plain_name(name), None if name else Rejection(Cause.BAD_NAME, "empty or not UTF-8"))

"""Images in a folder for each class, as ImageNet has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from data_prep.rejections import Cause, Rejection
from data_prep.sources import words
from data_prep.sources.folders import Folder, open_folder
from data_prep.sources.listed import Listed
from data_prep.sources.listings import Listings, images
from infra.config import operational
from infra.errors import SettingsError

LABEL = pa.field("label", pa.int32())
MOST_CLASSES = 16 << 20  # bytes that are read of a file of class names


class ImageNet(Listings):
    """A folder of class folders. An image's label, kept in the index, is the place of its class among the sorted names
    of the class folders; its caption is the class's name in a template.

    Names come from a file: `n01440764 tench, Tinca tinca` lines, or one name a line in the order of the folders.
    Without one, a folder's own name is its class's, with spaces for underscores.
    """

    kind: Literal["imagenet"]
    # Operational: the class names are part of the listing's identity, wherever they were read.
    classes: str | None = operational(None, description="the file of class names: in the folder, a path, or a URL")
    template: str = Field("a photo of a {name}", description="{name}: the first of a class's names; {names}: all")

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if "{name}" not in template and "{names}" not in template:
            raise ValueError("a template has a {name} or {names} where the class's name goes")
        return template

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        return {LABEL.name: LABEL.type}

    def kept_of(self, row: Listed) -> dict[str, Any]:
        return {LABEL.name: row.label}

    def listed(self, folder: Folder) -> Iterator[tuple[Listed, int]]:
        classes = self._classes(folder)
        for name, size, refused, stamp in images(folder):
            known = classes.get(name.partition("/")[0], (None, None)) if "/" in name else (None, None)
            yield Listed(name, size, refused and refused.value, None, *known), stamp

    def captions_of(self, folder: Folder, row: Listed) -> list[dict[str, str]] | Rejection:
        if row.classes is None:
            return Rejection(Cause.NO_CAPTION, "in no class folder")
        first = row.classes.partition(",")[0].strip()
        caption = self.template.replace("{names}", row.classes).replace("{name}", first)
        return words.captions([("caption", caption)], self.max_caption)

    def _classes(self, folder: Folder) -> dict[str, tuple[int, str]]:
        """Each class folder's label and names."""
        folders = sorted({name.partition("/")[0] for name, *_ in images(folder) if "/" in name})
        if self.classes is None:
            named = {name: name.replace("_", " ") for name in folders}
        else:
            named = _class_names(_class_lines(self.classes, folder), folders)
        return {name: (label, named[name]) for label, name in enumerate(folders)}


def _class_lines(path: str, folder: Folder) -> list[str]:
    if "://" in path or path.startswith("/"):
        parent, _, path = path.rpartition("/")
        folder = open_folder(parent or "/")
    with folder.open(path) as file:
        text = words.text(file.read(MOST_CLASSES))
    if text is None:
        raise SettingsError(f"{path} is not UTF-8", remedy="name a text file of class names")
    return [line.strip() for line in text.removeprefix(words.MARK).splitlines() if line.strip()]


def _class_names(lines: Sequence[str], folders: Sequence[str]) -> dict[str, str]:
    """The class name of each folder, from lines that begin with a folder's name or, else, one line for each folder."""
    named = {parts[0]: parts[1] for line in lines if len(parts := line.split(maxsplit=1)) == 2}
    if unnamed := [name for name in folders if name not in named]:
        if len(lines) == len(folders):
            return dict(zip(folders, lines, strict=True))
        raise SettingsError(
            f"no class name is given for the folder {unnamed[0]}, nor one for each of {len(folders)} folders",
            remedy="write a line `folder name` for each class folder, or one name a line in the folders' order",
        )
    return named

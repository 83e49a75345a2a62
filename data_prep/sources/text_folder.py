"""A folder of images, each with its caption in a text file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import words
from data_prep.sources.folders import Folder
from data_prep.sources.listed import Listed
from data_prep.sources.listings import Listings, images
from infra.config import spelt


class TextFolder(Listings):
    """Images in a folder and its subfolders, each with its caption in a text file beside it."""

    kind: Literal["text_folder"]
    caption_suffix: Annotated[str, spelt(r"(\.\w+)?", "a suffix such as .txt, or nothing")] = Field(
        ".txt", description="of the text beside an image; empty: images alone"
    )

    def listed(self, folder: Folder) -> Iterator[tuple[Listed, int]]:
        for name, size, refused, stamp in images(folder):
            text = None
            if self.caption_suffix and not refused:
                caption = self._read_beside(folder, name)
                content = caption if isinstance(caption, bytes) else caption.cause.encode()
                text = hashlib.blake2b(content, digest_size=16).digest()
            yield Listed(name, size, refused and refused.value, text, None, None), stamp

    def captions_of(self, folder: Folder, row: Listed) -> list[dict[str, str]] | Rejection:
        if not self.caption_suffix:
            return []
        data = self._read_beside(folder, row.name)
        if isinstance(data, Rejection):
            cause = Cause.NO_CAPTION if data.cause is Cause.MISSING else Cause.BAD_CAPTION
            return Rejection(cause, f"{self.caption_suffix} beside the image: {data.cause}")
        return words.captions([("caption", data)], self.max_caption)

    def _read_beside(self, folder: Folder, name: str) -> bytes | Rejection:
        """The text file beside an image, with the suffix as it is set or else in upper case: 5.TXT beside 5.JPG."""
        data: bytes | Rejection = Rejection(Cause.MISSING)
        for suffix in (self.caption_suffix, self.caption_suffix.upper()):
            data = folder.read(str(PurePosixPath(name).with_suffix(suffix)), 4 * self.max_caption)
            if not (isinstance(data, Rejection) and data.cause is Cause.MISSING):
                break
        return data

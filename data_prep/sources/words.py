"""Text from a corpus, which is not trusted: captions, licences, names and kept values, checked and bounded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from data_prep.rejections import Cause, Rejection

Image = TypeVar("Image")  # bytes, or what they will be read from

LONGEST_NAME = 8192  # characters of a name or an origin in the index; a URL has up to 8000

MARK = "\ufeff"  # the byte order mark, with which some editors begin a file; not a part of its text

# Control characters except for tab and line ends, and the halves of surrogate pairs.
_BAD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def text(value: bytes | str | None) -> str | None:
    """Bytes decoded as UTF-8; None if they are not. (The strings of a Parquet file are read as unchecked bytes.)"""
    if value is None or isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def captions(values: Sequence[tuple[str, Any]], longest: int) -> list[dict[str, str]] | Rejection:
    """The texts of each kind, stripped, without empty ones; a rejection if one is not allowed, or none is left."""
    texts = []
    for kind, value in values:
        for element in value if isinstance(value, list) else [value]:
            caption = _caption(element, longest)
            if isinstance(caption, Rejection):
                return caption._replace(detail=f"{kind}: {caption.detail}")
            if caption:
                texts.append({"kind": kind, "text": caption})
    return Rejection(Cause.NO_CAPTION) if values and not texts else texts


def _caption(value: Any, longest: int) -> str | Rejection:
    if value is None:
        return ""
    if not isinstance(value, str | bytes):
        return Rejection(Cause.BAD_CAPTION, f"{type(value).__name__}, not text")
    caption = text(value)
    if caption is None:
        return Rejection(Cause.BAD_CAPTION, "not UTF-8")
    caption = caption.removeprefix(MARK).strip()
    if len(caption) > longest:
        return Rejection(Cause.BAD_CAPTION, f"{len(caption)} characters")
    if bad := _BAD.search(caption):
        return Rejection(Cause.BAD_CAPTION, f"control character U+{ord(bad[0]):04X}")
    return caption


def image_and_captions(
    image: Image, captions: list[dict[str, str]] | Rejection
) -> tuple[Image | Rejection, list[dict[str, str]]]:
    """An item's image and captions. What is wrong with the captions refuses the image, unless it is refused already."""
    if isinstance(captions, Rejection):
        return (image if isinstance(image, Rejection) else captions), []
    return image, captions


def or_else(value: Any, default: str) -> str:
    """A row's own licence or origin if it has one, or else the source's."""
    own = (text(value) or "").strip() if isinstance(value, str | bytes) else ""
    return shown(own) if own else default


def shown(name: str) -> str:
    """A name as the index stores it: cut to LONGEST_NAME, and surrogates escaped."""
    return name[:LONGEST_NAME].encode(errors="backslashreplace").decode()


def kept(value: Any) -> Any:
    """A value of a kept column as the index stores it: text that is valid UTF-8, also in lists."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return [kept(element) for element in value] if isinstance(value, list) else value

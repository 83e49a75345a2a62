"""Strangers' words: captions, licences and kept values as text of bounded length, or what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from data_prep.rejections import Cause, Rejection

LONGEST_NAME = 8192  # characters of a name or an origin that the index takes; a URL has up to 8000

MARK = "\ufeff"  # of the byte order: how some editors begin a file, and no part of what it says

# Control characters except for tab and line ends, and the halves of surrogate pairs.
_BAD = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def text(value: bytes | str | None) -> str | None:
    """UTF-8 or nothing: Parquet's strings are bytes that nobody has checked."""
    if value is None or isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def captions(values: Iterable[tuple[str, Any]], longest: int) -> list[dict[str, str]] | Rejection:
    """The texts of each kind, stripped, empty ones dropped; or what is wrong with one of them."""
    kept = []
    for kind, value in values:
        for given in value if isinstance(value, list) else [value]:
            found = _caption(given, longest)
            if isinstance(found, Rejection):
                return found._replace(detail=f"{kind}: {found.detail}")
            if found:
                kept.append({"kind": kind, "text": found})
    return kept


def _caption(given: Any, longest: int) -> str | Rejection:
    if given is None:
        return ""
    if not isinstance(given, str | bytes):
        return Rejection(Cause.BAD_CAPTION, f"{type(given).__name__}, not text")
    found = text(given)
    if found is None:
        return Rejection(Cause.BAD_CAPTION, "not UTF-8")
    found = found.removeprefix(MARK).strip()
    if len(found) > longest:
        return Rejection(Cause.BAD_CAPTION, f"{len(found)} characters")
    if bad := _BAD.search(found):
        return Rejection(Cause.BAD_CAPTION, f"control character U+{ord(bad[0]):04X}")
    return found


def or_else(value: Any, default: str) -> str:
    """A row's own licence or origin, if it has one that can be shown."""
    found = text(value) if isinstance(value, str | bytes) else None
    return shown(found.strip()) if found and found.strip() else default


def shown(name: str) -> str:
    """A name as the index takes it, whatever it is made of."""
    return name[:LONGEST_NAME].encode(errors="backslashreplace").decode()


def kept(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return [kept(part) for part in value] if isinstance(value, list) else value

"""Makes text from outside, such as captions and URLs, safe to show in a terminal, a table, a picture or a record."""

from __future__ import annotations

import re
import unicodedata

_UNFIT = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, direction marks, surrogates, ends of lines


def printable(text: str) -> str:
    """The text without line breaks and invisible or direction-changing characters; single blanks replace them."""
    return " ".join("".join(" " if unicodedata.category(letter) in _UNFIT else letter for letter in text).split())


def cut(text: str, most: int = 60) -> str:
    """The same in at most so many letters; dots stand for the rest."""
    text = printable(text[: 4 * most])
    return text if len(text) <= most else text[: most - 1] + "…"


def masked(text: str) -> str:
    """The text without users and passwords in URLs."""
    return re.sub(r"//[^/@\s]+@", "//", text)

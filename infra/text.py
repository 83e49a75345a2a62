"""Strangers' words, made fit for a line of a terminal, of a table or of a picture."""

from __future__ import annotations

import unicodedata

_UNFIT = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, what turns letters around, halves of letters, line ends


def printable(text: str) -> str:
    """Without what would break a line, hide or turn letters around; single blanks in their place."""
    return " ".join("".join(" " if unicodedata.category(letter) in _UNFIT else letter for letter in text).split())

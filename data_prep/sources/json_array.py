"""Splits a JSON array into its elements in a stream, as the file may be far larger than memory.

Only brackets, commas and quotes are looked at; the caller parses each element. So that damage costs as few elements as
possible, an unclosed string ends with its line (JSON allows no line ends in strings), and an object that opens where a
field's name should be begins another element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

READ = 1 << 20

# The next bracket or comma outside of strings, or else the opening quote of a string that does not end in this chunk.
_MARK = re.compile(rb'(?:[^"\[\]{},]|"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*+")*+(["\[\]{},])')
_IN_STRING = re.compile(rb'[^"\\\n]*+(["\\\n])')


class Elements:
    """The bytes of each element, without the commas between them; None for an element that is too long.

    After the last element, `broken` says why there may be more in the file; it is empty for a whole array.
    """

    def __init__(self, file: BinaryIO, longest: int) -> None:
        self.broken = ""
        self._file, self._longest = file, longest
        self._held = bytearray()
        self._too_long = False
        self._chunk, self._at, self._from = b"", 0, 0  # the last chunk, where to scan on, where an element begins
        self._depth, self._opener, self._behind_comma = 0, b"", False

    def __iter__(self) -> Iterator[bytes | None]:
        """The file's position must be behind the bracket that opens the array."""
        while (mark := self._next(_MARK)) is not None:
            if mark == b"{" and self._depth == 1 and self._opener == b"{" and self._behind_comma:
                yield from self._element(self._at - 1)
            elif mark == b'"':
                if not self._pass_string():  # the line ends within it
                    yield from self._element(self._at)
                    self._depth = 0
            elif mark == b"]" and not self._depth:
                yield from self._element(self._at - 1)
                self._check_end()
                return
            elif mark in b"[{":
                self._opener = self._opener if self._depth else mark
                self._depth += 1
            elif mark in b"]}":
                self._depth = max(0, self._depth - 1)
            elif mark == b"," and not self._depth:
                yield from self._element(self._at - 1)
                self._from += 1
            self._behind_comma = mark == b","
        # The file has ended. A last object is whole if it is closed; a number or string may have been cut off.
        if not self._depth and self._held.rstrip().endswith(b"}"):
            yield from self._element(0)
        self.broken = "the array breaks off here"

    def _next(self, wanted: re.Pattern[bytes]) -> bytes | None:
        """The byte that `wanted` captures at its next match, behind which scanning goes on; None if the file ends."""
        start = self._at
        while (match := wanted.match(self._chunk, self._at)) is None:
            self._note_skipped(start, len(self._chunk))
            if not self._read():
                return None
            start = 0
        self._at = match.end()
        self._note_skipped(start, self._at - 1)
        return match[1]

    def _note_skipped(self, start: int, end: int) -> None:
        self._behind_comma = self._behind_comma and not self._chunk[start:end].strip()

    def _read(self) -> bool:
        self._hold(len(self._chunk))
        self._chunk, self._at, self._from = self._file.read(READ), 0, 0
        return bool(self._chunk)

    def _pass_string(self) -> bool:
        """Scan to the end of a string; False if its line ends first."""
        while (mark := self._next(_IN_STRING)) == b"\\":
            if self._at < len(self._chunk) or self._read():
                self._at += self._chunk[self._at] != ord("\n")
        return mark != b"\n"

    def _hold(self, end: int) -> None:
        self._too_long = self._too_long or len(self._held) + end - self._from > self._longest
        if self._too_long:
            self._held.clear()
        else:
            self._held += self._chunk[self._from : end]
        self._from = end

    def _element(self, end: int) -> Iterator[bytes | None]:
        self._hold(end)
        element, too_long = bytes(self._held).strip(), self._too_long
        self._held.clear()
        self._too_long = False
        if element or too_long:
            yield None if too_long else element

    def _check_end(self) -> None:
        rest = self._chunk[self._at :]
        while rest and not rest.strip():
            rest = self._file.read(READ)
        self.broken = "more behind the end of the array" if rest else ""

"""The elements of a JSON array, cut apart in a stream: such a file may be far larger than memory.

Elements are told apart by their brackets, commas and quotes alone, and parsed one by one by whoever asked. Damage stays
where it is, as far as it can be known: a text ends with its line at the latest, since JSON has no line ends in texts,
and an object that opens where a name should stand begins another element.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

READ = 1 << 20

# Brackets and commas outside of texts, which are passed over where they are whole; else a text's quote.
_MARK = re.compile(rb'(?:[^"\[\]{},]|"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*+")*+(["\[\]{},])')
_IN_TEXT = re.compile(rb'[^"\\\n]*+(["\\\n])')


class Elements:
    """An array's elements as they stand there, without what parts them; None for one that is too long.

    `broken` says, once all of them are read, why these may not be all.
    """

    def __init__(self, file: BinaryIO, longest: int) -> None:
        self.broken = ""
        self._file, self._longest = file, longest
        self._held = bytearray()
        self._too_long = False
        self._chunk, self._at, self._from = b"", 0, 0  # what was read last, how far it is looked at and given out
        self._depth, self._opener, self._behind_comma = 0, b"", False

    def __iter__(self) -> Iterator[bytes | None]:
        """The file stands behind the bracket that opens the array."""
        while (mark := self._next(_MARK)) is not None:
            if mark == b"{" and self._depth == 1 and self._opener == b"{" and self._behind_comma:
                yield from self._element(self._at - 1)
            elif mark == b'"':
                if not self._pass_text():  # the line ends within it
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
        if not self._depth and self._held.rstrip().endswith(
            b"}"
        ):  # an object is whole; what else is cut off nobody knows
            yield from self._element(0)
        self.broken = "the array breaks off here"

    def _next(self, wanted: re.Pattern[bytes]) -> bytes | None:
        """The next byte of these, whatever lies before it; None where the file ends."""
        start = self._at
        while (found := wanted.match(self._chunk, self._at)) is None:
            self._pass(start, len(self._chunk))
            if not self._read():
                return None
            start = 0
        self._at = found.end()
        self._pass(start, self._at - 1)
        return found[1]

    def _pass(self, start: int, end: int) -> None:
        self._behind_comma = self._behind_comma and not self._chunk[start:end].strip()

    def _read(self) -> bool:
        self._hold(len(self._chunk))
        self._chunk, self._at, self._from = self._file.read(READ), 0, 0
        return bool(self._chunk)

    def _pass_text(self) -> bool:
        while (mark := self._next(_IN_TEXT)) == b"\\":
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
        found, too_long = bytes(self._held).strip(), self._too_long
        self._held.clear()
        self._too_long = False
        if found or too_long:
            yield None if too_long else found

    def _check_end(self) -> None:
        rest = self._chunk[self._at :]
        while rest and not rest.strip():
            rest = self._file.read(READ)
        self.broken = "more behind the end of the array" if rest else ""

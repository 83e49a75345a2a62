"""Packed files, unpacked in a stream: what a byte stands for is known once everything before it has been read.

Nothing of theirs is trusted. Where the packing is damaged or breaks off, the stream ends and says so; so it does where
it comes to far more bytes than any honest file does, before a disk or a day is filled with zeros.
"""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from typing import Any, BinaryIO

import pyarrow as pa

from infra.errors import DataError

PACKINGS = (".gz", ".bz2", ".zst")
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}
# So many bytes may come of a packed one, and these in any case: texts and pictures are far from it, a bomb far beyond.
MOST_TIMES, IN_ANY_CASE = 100, 256 << 20
PIECE = 1 << 14  # bytes that are asked for at once: so many are lost with the damage behind them, at most

_DAMAGE = (EOFError, zlib.error, ValueError, OSError, pa.ArrowException)


def packing_of(name: str) -> str:
    """By the name; empty if there is none."""
    return next((packing for packing in PACKINGS if name.lower().endswith(packing)), "")


def packing_in(head: bytes) -> str:
    """By the first bytes."""
    return next((packing for magic, packing in MAGIC.items() if head.startswith(magic)), "")


class Unpacked(io.RawIOBase):
    """The bytes in a packed file, from its start."""

    def __init__(self, file: BinaryIO, packing: str, name: str) -> None:
        self.broken = ""  # why there is no more of it, unless it has come to its end
        self.last = b""  # the last byte that was read
        self.size = 0
        self._packed, self._name = file, name
        self._file: Any = _OPENERS[packing](file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.broken:
            return 0
        try:
            data = self._file.read1(min(len(buffer), PIECE))
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(
                    f"{self._name} cannot be read ({error.strerror})",
                    remedy="check the disk that it lies on, and run again",
                ) from None
            self.broken = "the packed file is damaged, or breaks off here"
            return 0
        self.size += len(data)
        if self.size > IN_ANY_CASE + MOST_TIMES * self._packed.tell():
            self.broken = f"the packed file comes to more than {MOST_TIMES} times its bytes"
            return 0
        self.last = data[-1:] or self.last
        buffer[: len(data)] = data
        return len(data)

    @property
    def times(self) -> float:
        """How many bytes came of a packed one so far."""
        return self.size / max(1, self._packed.tell())


_OPENERS = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": lambda file: bz2.BZ2File(file),
    ".zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"),
}

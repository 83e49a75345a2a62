"""Files compressed with gzip, bzip2 or zstd, decompressed in a stream.

They are not trusted. If the compressed data are damaged or cut off, the stream ends and `broken` says why; so it does
if they come to far more bytes than honest data do, before a bomb of zeros fills the disk or takes a day.
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
# A compressed byte may come to MOST_TIMES bytes, or the file to IN_ANY_CASE: text and images stay far below it.
MOST_TIMES, IN_ANY_CASE = 100, 256 << 20
PIECE = 1 << 14  # bytes decompressed at once: at most so many before a damaged place are lost with it

_DAMAGE = (EOFError, zlib.error, ValueError, OSError, pa.ArrowException)


def packing_of(name: str) -> str:
    """The suffix of the compression that a name ends with; empty without one."""
    return next((packing for packing in PACKINGS if name.lower().endswith(packing)), "")


def packing_in(head: bytes) -> str:
    """The suffix of the compression that a file's first bytes show; empty without one."""
    return next((packing for magic, packing in MAGIC.items() if head.startswith(magic)), "")


class Unpacked(io.RawIOBase):
    """The decompressed bytes of a file."""

    def __init__(self, file: BinaryIO, packing: str, name: str) -> None:
        self.broken = ""  # why it ended before the end of the data
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
        """Decompressed bytes for each compressed byte so far."""
        return self.size / max(1, self._packed.tell())


_OPENERS = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": lambda file: bz2.BZ2File(file),
    ".zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"),
}

"""PNG chunks: a file without those that its pixels do not need, and whether all rows are in it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.rejections import Cause, Refused

MAX_CHUNKS = 100_000
MAX_PROFILE = 4 << 20  # bytes; larger ICC profiles are ignored

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by colour type
_PALETTE = 3
# The first column and row of each pass, and the steps to the next ones.
_WHOLE = ((0, 0, 1, 1),)
_INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 1 << 18  # bytes that are inflated at a time


class Place(NamedTuple):
    """The size of an animation's canvas, and the place of the first frame on it."""

    width: int
    height: int
    left: int
    top: int


class Bare(NamedTuple):
    file: bytes
    exif: bytes
    profile: bytes | None
    place: Place | None = None  # None: the picture fills the canvas


def read(data: bytes) -> Bare:
    """The file with only the chunks that its pixels need, its EXIF and its ICC profile.

    Text chunks are dropped unread: they may decompress to a thousand times their size, and Pillow fails on long ones.
    """
    kept, frame, names = [data[:8]], _Frame(), set[bytes]()
    exif, profile = b"", None
    for name, body, whole in _chunks(data):
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            if not names and name != b"IHDR":
                raise Refused(Cause.CORRUPT, "PNG that does not begin with its header")
            if name == b"IDAT" and b"PLTE" not in names and kept[1][17:18] == bytes([_PALETTE]):
                raise Refused(Cause.CORRUPT, "PNG of palette colours without a palette")
            kept.append(whole)
            names.add(name)
        elif name == b"CgBI":
            raise Refused(Cause.UNSUPPORTED, "PNG as Xcode packs it")
        elif name == b"eXIf":
            exif = body
        elif name == b"iCCP" and profile is None:
            profile = _inflated(body[body.find(b"\0") + 2 :], MAX_PROFILE + 1)  # one that is longer is not used
        elif name in (b"acTL", b"fcTL", b"fdAT"):
            frame.add(name, body, b"IDAT" in names)
    chunks, place = frame.instead_of(kept)
    return Bare(b"".join(chunks), exif, profile, place)


class _Frame:
    """The first frame of an animation, if it is not the picture that viewers without animations show."""

    def __init__(self) -> None:
        self._before: list[bytes] = []  # chunks of the animation that stand before the picture's data
        self._heads: list[bytes] = []
        self._data: list[bytes] = []

    def add(self, name: bytes, body: bytes, behind: bool) -> None:
        """A chunk of the animation, and whether it stands behind the picture's data."""
        if not behind:
            self._before.append(name)
        elif name == b"fcTL":
            self._heads.append(body)
        elif name == b"fdAT" and len(self._heads) == 1:
            self._data.append(body[4:])

    def instead_of(self, kept: list[bytes]) -> tuple[list[bytes], Place | None]:
        """The chunks of a PNG of this frame, and its place; the picture's own chunks if there is no such frame."""
        if self._before != [b"acTL"] or not self._data or len(self._heads[0]) < 20:
            return kept, None  # the picture is the first frame, or there is no other
        width, height, left, top = struct.unpack_from(">4I", self._heads[0], 4)
        canvas_width, canvas_height = struct.unpack_from(">II", kept[1], 8)
        place = Place(canvas_width, canvas_height, left, top)
        if not (0 < width <= place.width - left and 0 < height <= place.height - top):
            raise Refused(Cause.CORRUPT, "PNG with a frame beyond its canvas")
        head = _chunk(b"IHDR", struct.pack(">II", width, height) + kept[1][16:21])
        colours = [chunk for chunk in kept[2:] if chunk[4:8] in (b"PLTE", b"tRNS")]
        return [kept[0], head, *colours, *(_chunk(b"IDAT", part) for part in self._data), _chunk(b"IEND", b"")], place


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """The name, the body and all bytes of each chunk. Checksums are verified, as Pillow does not for pixels."""
    at, name = 8, b""
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            raise Refused(Cause.TRUNCATED, "PNG without an end")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise Refused(Cause.TRUNCATED, "PNG that ends within a chunk")
        body = data[at + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(name)) == int.from_bytes(data[end - 4 : end], "big"):
            yield name, body, data[at:end]
        elif name[:1].isupper():
            raise Refused(Cause.CORRUPT, "PNG chunk with a wrong checksum")
        if name == b"IEND":
            return
        at = end
    raise Refused(Cause.CORRUPT, f"PNG of more than {MAX_CHUNKS} chunks")


def _inflated(data: bytes, limit: int) -> bytes | None:
    """At most the first `limit` bytes of compressed data; None if they are damaged."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return None


def check(file: bytes) -> None:
    """Refuse a file without all of its rows. This decompresses the pixels a second time."""
    missing = _size(*struct.unpack_from(">IIBBxxB", file, 16))
    press = zlib.decompressobj()
    for name, body, _ in _chunks(file):
        while name == b"IDAT" and body and missing > 0:
            missing -= len(press.decompress(body, _PIECE))
            body = press.unconsumed_tail
    while missing > 0 and (piece := press.decompress(b"", _PIECE)):
        missing -= len(piece)
    if missing > 0:
        raise Refused(Cause.TRUNCATED, "PNG with fewer rows than it promises")


def _size(width: int, height: int, depth: int, colour_type: int, interlaced: int) -> int:
    """The bytes of all rows, each with the byte that names its filter."""
    bits = depth * _SAMPLES.get(colour_type, 1)
    total = 0
    for left, top, right, down in _INTERLACED if interlaced else _WHOLE:
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0:
            total += max(rows, 0) * (1 + (columns * bits + 7) // 8)
    return total

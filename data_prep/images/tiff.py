"""What Pillow does not tell of a TIFF: parts that lie beyond its end, damage that libtiff goes over, odd samples."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import simplejpeg
from PIL import TiffImagePlugin, _imaging

from data_prep.images import jpeg
from data_prep.rejections import Cause, Refused

_PARTS = (  # where they are, and how long
    (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS),
    (TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.TILEBYTECOUNTS),
)
_RAW, _JPEG = 1, 7
_JPEG_TABLES = TiffImagePlugin.JPEGTABLES
# Compressions that libtiff reads here; the others are valid, and nobody's fault.
_READ = frozenset({_RAW, 2, 3, 4, 5, 6, _JPEG, 8, 32773, 32946, 34925, 50000})
_SPARE = 1 << 20  # pixels that a tile may be larger than the picture


# --- libtiff's errors --------------------------------------------------------------------------------------------

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_heard = threading.local()


def _note(_: int | None, module: bytes | None, *__: object) -> None:
    """What is wrong with a directory says nothing against the pixels, if they can be had."""
    if not (module or b"").startswith((b"TIFFFetch", b"TIFFReadDirectory", b"TIFFReadCustomDirectory")):
        _heard.errors = getattr(_heard, "errors", 0) + 1


_listener = _HANDLER(_note)  # it must live as long as libtiff may call it


def _listen() -> None:
    """Pillow goes on after many errors of libtiff, which end on the process's error output."""
    library = ctypes.CDLL(_imaging.__file__)  # what it is linked with is found through it
    library.TIFFSetErrorHandlerExt(_listener)
    library.TIFFSetErrorHandler(None)


_listen()


@contextmanager
def strictly() -> Iterator[None]:
    """What libtiff cannot decode inside of this block is refused, whatever Pillow makes of it."""
    _heard.errors = 0
    yield
    if _heard.errors:
        raise Refused(Cause.CORRUPT, "TIFF with damage in its picture")


# --- a directory that Pillow has read ----------------------------------------------------------------------------


def check(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """Before any memory is taken for the pixels."""
    tags = image.tag_v2
    width, height = (tags.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    if width * height > max(4 * image.width * image.height, _SPARE):
        raise Refused(Cause.CORRUPT, "TIFF with tiles far larger than the picture")
    packing = tags.get(TiffImagePlugin.COMPRESSION, _RAW)
    if packing not in _READ:
        raise Refused(Cause.UNSUPPORTED, "TIFF of a compression that is not read")
    parts = _parts(image)
    if _ends_early(data) or any(at + size > len(data) for at, size in parts):
        raise Refused(Cause.TRUNCATED, "TIFF that ends before its picture does")
    if packing == _JPEG:
        _check_jpegs(image, data, parts)


def _parts(image: TiffImagePlugin.TiffImageFile) -> list[tuple[int, int]]:
    """Where each part of the pixels is, and how long; a length that is more than all of them was never meant."""
    tags = image.tag_v2
    samples, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    most = image.width * image.height * samples * max(bits) // 8 if tags.get(259, _RAW) == _RAW else None
    found: list[tuple[int, int]] = []
    for offsets, sizes in _PARTS:
        for at, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False):
            found.append((at, size if most is None else min(size, most)))
    return found


def _check_jpegs(image: TiffImagePlugin.TiffImageFile, data: bytes, parts: list[tuple[int, int]]) -> None:
    """Each part is a JPEG; libtiff goes over damage in it, and Pillow does not let it say so."""
    tables = bytes(image.tag_v2.get(_JPEG_TABLES, b""))[:-2]
    left = 4 * image.width * image.height + _SPARE
    for at, size in parts:
        part = data[at : at + size]
        whole = tables + part[2:] if tables else part
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(whole, strict=False)
        except ValueError:
            continue  # libtiff may know of it, or fails
        left -= height * width
        if left < 0:
            raise Refused(Cause.CORRUPT, "TIFF with JPEGs far larger than the picture")
        jpeg.read(whole)
        try:
            jpeg.pixels(whole, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY")
        except ValueError as error:
            raise Refused(Cause.CORRUPT, "TIFF with damage in its picture") from error


# --- one that Pillow could not open ------------------------------------------------------------------------------


def unreadable(data: bytes, error: BaseException) -> Refused:
    """Why Pillow did not open it or read its pixels."""
    if _ends_early(data):
        return Refused(Cause.TRUNCATED, "TIFF that ends before its picture does")
    if any(said in str(error) for said in _NOT_READ):
        return Refused(Cause.UNSUPPORTED, "TIFF of samples that are not read")
    return Refused(Cause.CORRUPT, "TIFF with damage")


# What Pillow says of files that may be whole: their samples are of a type, a number or an order that it does not know.
_NOT_READ = ("unknown pixel mode", "unknown data organization", "Windows Media Photo", "not yet supported")
_NEEDED = frozenset({256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 339, 347})
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of a value, by type


def _ends_early(data: bytes) -> bool:
    """The first directory, or a value in it that the pixels need, lies beyond the end."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] not in (b"*\0", b"\0*"):  # of 64 bits: its directory is all that is looked for
        return len(data) < 16 or struct.unpack_from(order + "Q", data, 8)[0] + 8 > len(data)
    if len(data) < 8:
        return True
    (at,) = struct.unpack_from(order + "I", data, 4)
    if at + 2 > len(data):
        return True
    (count,) = struct.unpack_from(order + "H", data, at)
    entries = data[at + 2 : at + 2 + 12 * count]
    if len(entries) < 12 * count:
        return True
    found = struct.iter_unpack(order + "HHII", entries)
    sizes = ((_SIZES.get(kind, 0) * values, where) for tag, kind, values, where in found if tag in _NEEDED)
    return any(size > 4 and where + size > len(data) for size, where in sizes)

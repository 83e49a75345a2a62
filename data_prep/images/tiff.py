"""Checks of TIFF that Pillow lacks: data beyond the end of the file, damage that libtiff ignores, unusual samples."""

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

_PARTS = (  # the tags of the offsets of strips or tiles, and of their lengths
    (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS),
    (TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.TILEBYTECOUNTS),
)
_RAW, _JPEG = 1, 7
_JPEG_TABLES = TiffImagePlugin.JPEGTABLES
# Compressions that libtiff can read here. Files with others are valid, so they are refused as unsupported.
_READ = frozenset({_RAW, 2, 3, 4, 5, 6, _JPEG, 8, 32773, 32946, 34925, 50000})
_SPARE = 1 << 20  # pixels that a tile may be larger than the picture


# --- libtiff's errors --------------------------------------------------------------------------------------------

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_heard = threading.local()


def _note(_: int | None, module: bytes | None, *__: object) -> None:
    """Count an error of libtiff, but for errors in a directory: they do not matter if the pixels can be decoded."""
    if not (module or b"").startswith((b"TIFFFetch", b"TIFFReadDirectory", b"TIFFReadCustomDirectory")):
        _heard.errors = getattr(_heard, "errors", 0) + 1


_listener = _HANDLER(_note)  # kept, since libtiff may call it at any time


# Have libtiff report its errors here: Pillow ignores many of them, and they would be printed to stderr.
_libtiff = ctypes.CDLL(_imaging.__file__)  # libtiff's symbols are found through it, as it is linked with libtiff
_libtiff.TIFFSetErrorHandlerExt(_listener)
_libtiff.TIFFSetErrorHandler(None)


@contextmanager
def strictly() -> Iterator[None]:
    """Refuse a picture in which libtiff reports an error within this block, even if Pillow ignores it."""
    _heard.errors = 0
    yield
    if _heard.errors:
        raise Refused(Cause.CORRUPT, "TIFF with damage in its picture")


# --- a directory that Pillow has read ----------------------------------------------------------------------------


def check(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """Refuse what can be refused before memory is allocated for the pixels."""
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
    """The offset and length of each strip or tile; an uncompressed one is no longer than all pixels are."""
    tags = image.tag_v2
    samples, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    most = image.width * image.height * samples * max(bits) // 8 if tags.get(259, _RAW) == _RAW else None
    return [
        (at, size if most is None else min(size, most))
        for offsets, sizes in _PARTS
        for at, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False)
    ]


def _check_jpegs(image: TiffImagePlugin.TiffImageFile, data: bytes, parts: list[tuple[int, int]]) -> None:
    """Check each part, which is a JPEG, as `jpeg` does: libtiff ignores damage in it."""
    tables = bytes(image.tag_v2.get(_JPEG_TABLES, b""))[:-2]
    left = 4 * image.width * image.height + _SPARE
    for at, size in parts:
        part = data[at : at + size]
        whole = tables + part[2:] if tables else part
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(whole, strict=False)
        except ValueError:
            continue  # libtiff decodes it or reports an error
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
    """Why Pillow failed to open it or to read its pixels."""
    if _ends_early(data):
        return Refused(Cause.TRUNCATED, "TIFF that ends before its picture does")
    if any(message in str(error) for message in _NOT_READ):
        return Refused(Cause.UNSUPPORTED, "TIFF of samples that are not read")
    return Refused(Cause.CORRUPT, "TIFF with damage")


# Pillow's messages about files that may be valid, with samples of a type, number or order that it does not support.
_NOT_READ = ("unknown pixel mode", "unknown data organization", "Windows Media Photo", "not yet supported")
_NEEDED = frozenset({256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 339, 347})
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of a value, by type


def _ends_early(data: bytes) -> bool:
    """Whether the first directory, or a value in it that is needed for the pixels, is beyond the end of the file."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] not in (b"*\0", b"\0*"):  # BigTIFF, of which only the directory's offset is checked
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
    fields = struct.iter_unpack(order + "HHII", entries)
    sizes = ((_SIZES.get(kind, 0) * values, offset) for tag, kind, values, offset in fields if tag in _NEEDED)
    return any(size > 4 and offset + size > len(data) for size, offset in sizes)

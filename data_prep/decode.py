"""Bytes of an untrusted file -> upright sRGB 8-bit RGB, or a Rejection with its cause.

The header is read first, and what it promises is held against the limits before a pixel is decoded. JPEG goes through
simplejpeg (several times faster than Pillow, and strict: a truncated file is refused); all else through Pillow, which
is shown only the one format that the file's first bytes name. JPEG and PNG metadata, which can be made to cost far
more than the picture, is read here, as little of it as the pixels need.

Memory: at most 24 bytes a pixel, three times the file, and 64 MiB (tests/data_prep/test_fuzz.py).
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import AvifImagePlugin, Image, ImageCms, TiffImagePlugin

from data_prep.rejections import Cause, Rejection

Pixels_HW3 = npt.NDArray[np.uint8]  # H height, W width

ORIENTATION = 0x0112  # the EXIF tag
STRIP = 1 << 20  # pixels whose colours are worked out at a time

# What no camera or program writes, and what only costs time: a progressive scan goes over all of a picture, however few
# its bytes are, and neither library stops at any number of scans.
MAX_SCANS = 100
MAX_SEGMENTS = 4096
MAX_CHUNKS = 100_000
MAX_PROFILE = 4 << 20  # bytes; larger ICC profiles are ignored
Matte = tuple[int, int, int]

# What Pillow's parsers, libjpeg and lcms raise on damaged files: whatever a parser trips over first.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    SyntaxError,
    EOFError,
    RuntimeError,
    MemoryError,
    AssertionError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
)

# Our own limit is checked from the header, and what damaged metadata costs is our own decision: no noise about either.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker has one core


class Decoded(NamedTuple):
    pixels: Pixels_HW3
    format: str


class _Refused(Exception):
    def __init__(self, cause: Cause, detail: str = "") -> None:
        self.rejection = Rejection(cause, detail)


def decoder_versions() -> dict[str, str]:
    """What the pixels depend on besides the file: kept in every shard's record."""
    return {name: version(name) for name in ("simplejpeg", "pillow", "torch")}


def decode(data: bytes, *, max_pixels: int = 80_000_000, matte: Matte = (255, 255, 255)) -> Decoded | Rejection:
    """The picture in `data`: first frame, upright, in sRGB, transparency laid on the matte."""
    kind = sniff(data)
    if kind is None:
        return Rejection(Cause.UNKNOWN_FORMAT, repr(data[:12])) if data else Rejection(Cause.EMPTY)
    try:
        pixels = _decode_jpeg(data, max_pixels) if kind == "JPEG" else _decode_other(data, kind, max_pixels, matte)
    except _Refused as refused:
        return refused.rejection
    except Image.DecompressionBombError as error:
        return Rejection(Cause.TOO_MANY_PIXELS, _said(error))
    except _DAMAGE as error:
        text = _said(error)
        cut = any(word in text.lower() for word in ("truncated", "premature end", "end of file", "unexpected end"))
        return Rejection(Cause.TRUNCATED if cut else Cause.CORRUPT, text)
    return Decoded(pixels, kind.lower())


def sniff(data: bytes) -> str | None:
    """The kind of file by its first bytes; names and suffixes are not believed."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF"
    return None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _Refused(Cause.CORRUPT, f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise _Refused(Cause.TOO_MANY_PIXELS, f"{width} x {height} pixels")


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels_HW3:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, max_pixels)
    orientation, profile = _read_jpeg(data)
    if colours in ("CMYK", "YCCK"):
        # Every writer of CMYK JPEGs follows Adobe's, who stores the inks inverted, with Adobe's marker or without it.
        inks = simplejpeg.decode_jpeg(data, "CMYK")
        np.subtract(255, inks, out=inks)
        return _upright(_painted(Image.fromarray(inks, "CMYK"), profile), orientation)
    pixels: Pixels_HW3 = simplejpeg.decode_jpeg(data, "RGB")
    mode = "L" if colours == "Gray" else "RGB"
    if profile and _transform(profile, mode) is not None:
        for rows in _strips(height, width):
            stored = pixels[rows, :, 0] if mode == "L" else pixels[rows]
            pixels[rows] = np.asarray(_in_srgb(Image.fromarray(np.ascontiguousarray(stored)), profile))
    return _upright(pixels, orientation)


def _read_jpeg(data: bytes) -> tuple[int, bytes | None]:
    """The orientation and the ICC profile; refused are other than 8 bits, and more scans than a program writes."""
    exif: bytes | None = None
    parts: list[bytes] = []
    components, scans, progressive = 0, 0, False
    for marker, body in _jpeg_segments(data):
        if marker == 0xE1 and exif is None and body.startswith(b"Exif\0\0"):
            exif = body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            parts.append(body)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) > 5:
            if body[0] != 8:
                raise _Refused(Cause.UNSUPPORTED, f"JPEG of {body[0]} bits a sample")
            components, progressive = body[5], marker in (0xC2, 0xC6, 0xCA, 0xCE)
        elif marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise _Refused(Cause.CORRUPT, f"JPEG of more than {MAX_SCANS} scans")
            if not progressive and body[:1] == bytes([components]):
                break  # all there is in one scan, and the decoder accepts no other
    parts.sort()
    whole = bool(parts) and parts[0][13] == len(parts)
    return exif_orientation(exif or b""), b"".join(part[14:] for part in parts) if whole else None


# Stuffed zeros and restarts are part of a scan; the decoder skips both between segments, too.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment up to the end of the picture. Damage is for the decoder to find."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":
            return
        at = found.end()
        end = at + int.from_bytes(data[at : at + 2], "big")
        yield found[1][0], data[at + 2 : end]
        at = max(end, at + 2)
    raise _Refused(Cause.CORRUPT, f"JPEG of more than {MAX_SEGMENTS} segments")


def exif_orientation(exif: bytes) -> int:
    """1 to 8; unreadable EXIF says nothing, and says nothing against the picture.

    EXIF alone is asked, as browsers do: whoever wrote the caption saw the picture that way.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return 1
    magic, at = struct.unpack_from(order + "HI", exif, 2)
    if magic != 42 or at + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(order + "H", exif, at)
    entries = exif[at + 2 : at + 2 + 12 * count]
    whole = entries[: len(entries) // 12 * 12]
    for tag, kind, values, value in struct.iter_unpack(order + "HHI4s", whole):
        if tag == ORIENTATION and values == 1 and kind in (3, 4, 8, 9):
            found: int = struct.unpack_from(order + ("H" if kind in (3, 8) else "I"), value)[0]
            return found if 1 <= found <= 8 else 1
    return 1


def _decode_other(data: bytes, kind: str, max_pixels: int, matte: Matte) -> Pixels_HW3:
    pixels, orientation = _load_other(data, kind, max_pixels, matte)
    return _upright(pixels, orientation)  # when Pillow's copies are gone


def _load_other(data: bytes, kind: str, max_pixels: int, matte: Matte) -> tuple[Pixels_HW3, int]:
    exif, profile = b"", None
    if kind == "PNG":
        data, exif, profile = _read_png(data)
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        _check_size(*image.size, max_pixels)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tile(image)  # Pillow turns these upright by itself
        elif kind != "PNG":
            exif = image.info.get("exif", b"")
        profile = profile or image.info.get("icc_profile")
        image.load()
        if image.mode in ("I", "F"):
            raise _Refused(Cause.UNSUPPORTED, f"{kind} of mode {image.mode}: its values have no fixed range")
        return _painted(image, profile, matte), exif_orientation(exif)


def _check_tile(image: TiffImagePlugin.TiffImageFile) -> None:
    """libtiff takes memory for a whole tile, however little of it lies in the picture."""
    width, height = (image.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    if width * height > max(4 * image.width * image.height, STRIP):
        raise _Refused(Cause.CORRUPT, f"TIFF with tiles of {width} x {height} pixels")


def _read_png(data: bytes) -> tuple[bytes, bytes, bytes | None]:
    """The file with no more than its pixels need, its EXIF and its ICC profile.

    Texts are dropped unread: they may be compressed a thousandfold, and Pillow refuses a picture for long ones.
    """
    kept, exif, profile = [data[:8]], b"", None
    for name, body, whole in _png_chunks(data):
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(whole)
        elif name == b"eXIf":
            exif = body
        elif name == b"iCCP" and profile is None:
            profile = _inflated(body[body.find(b"\0") + 2 :], MAX_PROFILE + 1)  # too long by one is not used
    return b"".join(kept), exif, profile


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Name, body and all of each chunk. The checksums of the pixels are looked at here, as Pillow does not do it."""
    at, name = 8, b""
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            raise _Refused(Cause.TRUNCATED, "PNG without an end")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise _Refused(Cause.TRUNCATED, f"PNG chunk {name!r}")
        body = data[at + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(name)) == int.from_bytes(data[end - 4 : end], "big"):
            yield name, body, data[at:end]
        elif name[:1].isupper():
            raise _Refused(Cause.CORRUPT, f"checksum of PNG chunk {name!r}")
        if name == b"IEND":
            return
        at = end
    raise _Refused(Cause.CORRUPT, f"PNG of more than {MAX_CHUNKS} chunks")


def _inflated(data: bytes, limit: int) -> bytes | None:
    """The first `limit` bytes at most."""
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error:
        return None


def _upright(pixels: Pixels_HW3, orientation: int) -> Pixels_HW3:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _strips(height: int, width: int) -> Iterator[slice]:
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def _painted(image: Image.Image, profile: bytes | None, matte: Matte = (255, 255, 255)) -> Pixels_HW3:
    """Any mode that Pillow reads -> RGB in sRGB on the matte; by strips, as each step of it takes a copy."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _strips(image.height, image.width):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        pixels[rows] = np.asarray(_flat_srgb(strip, profile, matte))
    return pixels


def _flat_srgb(image: Image.Image, profile: bytes | None, matte: Matte) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns mid-grey into white.
        wide = np.asarray(image).astype(np.uint32)
        return _in_srgb(Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)), profile)
    if not image.has_transparency_data:
        base = image.mode if image.mode in ("L", "RGB", "CMYK") else "L" if image.mode == "1" else "RGB"
        return _in_srgb(image.convert(base), profile)
    whole = image.convert("RGBA")
    colours = image.convert("L") if image.mode in ("LA", "La", "L", "1") else whole.convert("RGB")
    return Image.composite(_in_srgb(colours, profile), Image.new("RGB", image.size, matte), whole.getchannel("A"))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, image.mode) if profile and len(profile) <= MAX_PROFILE else None
    if transform is None:
        return image.convert("RGB")
    done = ImageCms.applyTransform(image, transform)
    assert done is not None
    return done


@lru_cache(maxsize=16)  # it holds the profiles, too
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from an embedded profile to sRGB; None where it changes nothing or the profile is of no use.

    Most profiles in photographs are sRGB itself, under many names. Colours are tried out rather than names compared:
    a profile that moves no colour by more than one level is skipped, at a third of the time.
    An unreadable profile, or one for other colours than the file has, is ignored as browsers do.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        probe = _probe_colours(mode)
        moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
    except _DAMAGE:
        return None
    return transform if np.abs(moved).max() > 1 else None


def _probe_colours(mode: str) -> Image.Image:
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3))

"""Bytes of an untrusted file -> upright sRGB 8-bit RGB, or a Rejection with its cause.

The header is read first, and what it promises is held against the limits before a pixel is decoded. JPEG goes through
simplejpeg (several times faster than Pillow, and strict: a truncated file is refused); all else through Pillow, which
is shown only the one format that the file's first bytes name.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageCms

from data_prep.rejections import Cause, Rejection

Pixels_HW3 = npt.NDArray[np.uint8]  # H height, W width

ORIENTATION = 0x0112  # the EXIF tag
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
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
        orientation, profile = _orientation(header), header.info.get("icc_profile")
    if colours in ("CMYK", "YCCK"):
        # Every writer of CMYK JPEGs follows Adobe's, who stores the inks inverted.
        inks = np.subtract(255, simplejpeg.decode_jpeg(data, "CMYK"), dtype=np.uint8)
        return _upright(np.array(_in_srgb(Image.fromarray(inks, "CMYK"), profile)), orientation)
    pixels: Pixels_HW3 = simplejpeg.decode_jpeg(data, "RGB")
    if profile:
        mode = "L" if colours == "Gray" else "RGB"
        if _transform(profile, mode) is not None:
            stored = pixels[:, :, 0] if mode == "L" else pixels
            pixels = np.array(_in_srgb(Image.fromarray(np.ascontiguousarray(stored)), profile))
    return _upright(pixels, orientation)


def _decode_other(data: bytes, kind: str, max_pixels: int, matte: Matte) -> Pixels_HW3:
    if kind == "PNG":
        _check_png(data)
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        _check_size(*image.size, max_pixels)
        orientation, profile = _orientation(image), image.info.get("icc_profile")
        image.load()
        if image.mode in ("I", "F"):
            raise _Refused(Cause.UNSUPPORTED, f"{kind} of mode {image.mode}: its values have no fixed range")
        return _upright(np.array(_flat_srgb(image, profile, matte)), orientation)


def _check_png(data: bytes) -> None:
    """The checksums of the critical chunks; Pillow does not look at those of the pixels."""
    at, name = 8, b""
    while name != b"IEND":
        if at + 12 > len(data):
            raise _Refused(Cause.TRUNCATED, "PNG without an end")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise _Refused(Cause.TRUNCATED, f"PNG chunk {name!r}")
        if name[:1].isupper() and zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise _Refused(Cause.CORRUPT, f"checksum of PNG chunk {name!r}")
        at = end + 4


def _orientation(image: Image.Image) -> int:
    """1 to 8; unreadable EXIF says nothing, and says nothing against the picture."""
    try:
        found: Any = image.getexif().get(ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


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


def _flat_srgb(image: Image.Image, profile: bytes | None, matte: Matte) -> Image.Image:
    """Any mode that Pillow reads -> RGB in sRGB on the matte."""
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
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    done = ImageCms.applyTransform(image, transform)
    assert done is not None
    return done


@lru_cache(maxsize=32)
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

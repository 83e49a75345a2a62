"""Bytes of an untrusted file -> upright sRGB 8-bit RGB, or a Rejection with its cause.

The header is read first, and its size is checked against the limits before a pixel is decoded. JPEG is decoded by
simplejpeg (several times faster than Pillow, and strict: it reports damage), all else by Pillow, which may try only the
format that the file's first bytes name. JPEG and PNG metadata can be made to cost far more than the picture: jpeg.py
and png.py read as little of it as the pixels need. A picture of which a part is missing or damaged is refused wherever
that can be detected, though most decoders would fill it in.

Memory: at most 24 bytes a pixel, three times the file, and 64 MiB (tests/data_prep/test_fuzz.py).
"""

from __future__ import annotations

import io
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
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from data_prep.images import bmp, jpeg, kinds, png, tiff
from data_prep.images.png import MAX_PROFILE
from data_prep.rejections import Cause, Refused, Rejection

Pixels_HW3 = npt.NDArray[np.uint8]  # H height, W width

ORIENTATION = 0x0112  # the EXIF tag
STRIP = 1 << 20  # pixels whose colours are converted at a time

Matte = tuple[int, int, int]

# What Pillow's parsers, libjpeg and lcms raise on damaged files: whatever their code happens to fail with.
_DAMAGE = (
    *(OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, SyntaxError, EOFError),
    *(RuntimeError, MemoryError, AssertionError, struct.error, zlib.error, ImageCms.PyCMSError),
)

# Sizes are checked here, before decoding, and damaged metadata is handled here: Pillow's warnings say nothing new.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker has one core

# `Image.open` would not say why a format's parser failed.
_OPENED: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


class Decoded(NamedTuple):
    pixels: Pixels_HW3
    format: str


def decoder_versions() -> dict[str, str]:
    """The libraries that the pixels depend on besides the file; they are kept in every shard's record."""
    return {name: version(name) for name in ("simplejpeg", "pillow", "torch")}


def decode(data: bytes, *, max_pixels: int = 80_000_000, matte: Matte = (255, 255, 255)) -> Decoded | Rejection:
    """The picture in `data`: the first frame, upright, in sRGB, blended with the matte where it is transparent."""
    kind = sniff(data)
    if kind is None:
        return kinds.refusal(data)
    try:
        pixels = _decode_jpeg(data, max_pixels) if kind == "JPEG" else _decode_other(data, kind, max_pixels, matte)
    except Refused as refused:
        return refused.rejection
    except Image.DecompressionBombError:
        return Rejection(Cause.TOO_MANY_PIXELS, "a frame of too many pixels")
    except _DAMAGE as error:
        return _why(data, kind, error)
    return Decoded(pixels, kind.lower())


def _why(data: bytes, kind: str, error: BaseException) -> Rejection:
    """Why Pillow or libjpeg failed. Their own messages are not stored: they may hold addresses of objects."""
    refused = Refused(Cause.CORRUPT, f"{kind} with damage")
    try:
        if kind == "JPEG":
            refused = jpeg.damage(data, error)
        elif kind == "PNG":
            png.check(png.read(data).file)
        elif kind == "TIFF":
            refused = tiff.unreadable(data, error)
        elif kinds.ends_early(kind, data):
            refused = Refused(Cause.TRUNCATED, f"{kind} that ends early")
        elif kind == "BMP" and bmp.unsupported(data):
            refused = Refused(Cause.UNSUPPORTED, "BMP of a kind that is not read")
    except Refused as reason:
        refused = reason
    except _DAMAGE:
        pass  # the damage that stopped the decoder stops this check, too
    return refused.rejection


def sniff(data: bytes) -> str | None:
    """The format by the file's first bytes, whatever its name; None for those that are not read."""
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
    return "AVIF" if kinds.brands(data) & {b"avif", b"avis"} else None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Refused(Cause.CORRUPT, f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise Refused(Cause.TOO_MANY_PIXELS, f"{width} x {height} pixels")


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels_HW3:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    _check_size(width, height, max_pixels)
    exif, profile = jpeg.read(data)
    orientation = exif_orientation(exif)
    if colours in ("CMYK", "YCCK"):
        # All writers of CMYK JPEGs store the inks inverted, as Adobe does, with Adobe's marker or without it.
        inks = jpeg.pixels(data, "CMYK")
        np.subtract(255, inks, out=inks)
        return _upright(_painted(Image.fromarray(inks, "CMYK"), profile), orientation)
    pixels = jpeg.pixels(data, "RGB")
    mode = "L" if colours == "Gray" else "RGB"
    if profile and _transform(profile, mode) is not None:
        for rows in _strips(height, width):
            stored = pixels[rows, :, 0] if mode == "L" else pixels[rows]
            pixels[rows] = np.asarray(_in_srgb(Image.fromarray(np.ascontiguousarray(stored)), profile))
    return _upright(pixels, orientation)


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8. Unreadable EXIF counts as 1 and does not refuse the picture.

    Only EXIF counts, as in browsers: the author of the caption saw the picture that way.
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
            orientation: int = struct.unpack_from(order + ("H" if kind in (3, 8) else "I"), value)[0]
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def _decode_other(data: bytes, kind: str, max_pixels: int, matte: Matte) -> Pixels_HW3:
    if kind == "BMP" and (header := bmp.masked(data)):
        _check_size(header.width, header.height, max_pixels)
        return bmp.pixels(data, header, matte)
    pixels, orientation = _load_other(data, kind, max_pixels, matte)
    return _upright(pixels, orientation)  # not within _load_other, which holds Pillow's copies of the pixels


def _load_other(data: bytes, kind: str, max_pixels: int, matte: Matte) -> tuple[Pixels_HW3, int]:
    exif, profile, place = b"", None, None
    if kind == "PNG":
        data, exif, profile, place = png.read(data)
        if place:
            _check_size(place.width, place.height, max_pixels)
    with _OPENED[kind](io.BytesIO(data)) as image:
        _check_size(*image.size, max_pixels)
        frame = _first_frame(image, data)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            tiff.check(image, data)  # Pillow turns these upright by itself
        elif kind != "PNG":
            exif = image.info.get("exif", b"")
        profile = profile or image.info.get("icc_profile")
        with tiff.strictly():
            image.load()
        if image.mode in ("I", "F"):
            raise Refused(Cause.UNSUPPORTED, f"{kind} of values without a fixed range")
        if kind == "PNG" and _may_lack_rows(image):
            png.check(data)
        pixels = _painted(image, profile, matte)
    if place:
        pixels = _on_canvas(pixels, place, matte)
    return _within(pixels, frame, matte), exif_orientation(exif)


def _on_canvas(pixels: Pixels_HW3, place: png.Place, matte: Matte) -> Pixels_HW3:
    canvas = np.empty((place.height, place.width, 3), np.uint8)
    canvas[:] = matte
    canvas[place.top :, place.left :][: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas


def _may_lack_rows(image: Image.Image) -> bool:
    """Whether the file may be cut off: its missing rows, one of the last two among them, are then zeros."""
    last = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))
    return len(last) < 2 or not all(row.any() for row in last)


def _first_frame(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int, int, int] | None:
    """The box of an animation's first frame on its canvas, which is transparent around it."""
    if isinstance(image, GifImagePlugin.GifImageFile):
        return image.tile[0].extents
    return kinds.webp_frame(data) if isinstance(image, WebPImagePlugin.WebPImageFile) else None


def _within(pixels: Pixels_HW3, frame: tuple[int, int, int, int] | None, matte: Matte) -> Pixels_HW3:
    if frame is not None:
        left, top, right, bottom = frame
        for outside in (pixels[:top], pixels[bottom:], pixels[:, :left], pixels[:, right:]):
            outside[:] = matte
    return pixels


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
    """Any mode that Pillow reads -> sRGB, blended with the matte; in strips, since each step makes a copy."""
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
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "only an in-place transform returns nothing"
    return converted


@lru_cache(maxsize=16)  # few, since its keys are whole profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an embedded profile to sRGB; None if it would change nothing or the profile cannot be used.

    Most profiles in photographs are sRGB itself, under many names. So test colours are transformed: a profile that
    moves none of them by more than one level is skipped, which takes a third of the time.
    An unreadable profile, or one for other colours than the file has, is ignored, as in browsers.
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

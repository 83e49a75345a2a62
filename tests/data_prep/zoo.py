"""Files of every kind, made here, so that what their pixels should be is known."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def picture(height: int = 24, width: int = 40) -> Pixels:
    """Smooth, different at every corner and in every channel: any turn, swap or shift of colours shows."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 20 + 200 * x / (width - 1), 30 + 180 * y / (height - 1)
    blue = 240 - 100 * x / (width - 1) - 90 * y / (height - 1)
    return np.stack([red, green, blue], -1).round().astype(np.uint8)


def photograph(seed: int, height: int, width: int) -> Pixels:
    """Like a photograph in what a resize finds hard: light at every scale (1/f), hard edges, fine lines, grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    reach = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(height, width)
    waves = rng.normal(size=(3, *reach.shape)) + 1j * rng.normal(size=(3, *reach.shape))
    clouds = np.fft.irfft2(waves / reach**1.2, s=(height, width))
    light = clouds.mean(0) + 0.4 * clouds
    light = 128 + 40 * (light - light.mean()) / light.std()
    for _ in range(12):  # flat things with hard edges
        middle, radius = rng.uniform(0, [height, width]), rng.uniform(0.02, 0.15) * width
        light[:, np.hypot(y - middle[0], x - middle[1]) < radius] = rng.choice([35, 60, 190, 220], (3, 1))
    lines = (np.sin((x * np.cos(seed) + y * np.sin(seed)) * rng.uniform(0.5, 3)) > 0.6) & (x > 0.7 * width)
    light[:, lines] = 40
    light += rng.normal(scale=4, size=light.shape)
    return np.ascontiguousarray(light.clip(10, 245).round().astype(np.uint8).transpose(1, 2, 0))


def saved(image: Image.Image | npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png(
    width: int, height: int, depth: int, colour_type: int, pixels: npt.NDArray[Any] | bytes, extra: bytes = b""
) -> bytes:
    """A PNG of any depth, or one whose header lies: `pixels` as bytes are taken as they are."""
    if not isinstance(pixels, bytes):
        rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
        pixels = np.pad(rows, ((0, 0), (1, 0))).tobytes()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def rows_of(pixels: npt.NDArray[Any], interlaced: bool) -> bytes:
    """A PNG's rows as they are before they are packed, each behind the byte that names its filter."""
    passes = [pixels[top::down, left::right] for left, top, right, down in PASSES] if interlaced else [pixels]
    parts = (np.ascontiguousarray(part).view(np.uint8).reshape(part.shape[0], -1) for part in passes if part.size)
    return b"".join(np.pad(part, ((0, 0), (1, 0))).tobytes() for part in parts)


def interlaced_png(pixels: Pixels, rows: bytes) -> bytes:
    height, width = pixels.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(
    width: int, height: int, channels: int, parts: npt.NDArray[np.uint8], tile: tuple[int, int] | None = None
) -> bytes:
    """A TIFF without compression; `parts` are its strips or its tiles, one in each row."""
    at = [8 + number * parts.shape[1] for number in range(len(parts))]
    lists = struct.pack(f"<{len(at)}I", *at) + struct.pack(f"<{len(at)}I", *[parts.shape[1]] * len(at))
    lists_at, single = 8 + parts.size, len(at) == 1
    where, lengths = (at[0], parts.shape[1]) if single else (lists_at, lists_at + 4 * len(at))
    tags = {256: (width, 1), 257: (height, 1), 258: (8, 1), 259: (1, 1), 262: (2, 1), 277: (channels, 1)}
    if tile is None:
        tags |= {273: (where, len(at)), 278: (height, 1), 279: (lengths, len(at))}
    else:
        tags |= {322: (tile[0], 1), 323: (tile[1], 1), 324: (where, len(at)), 325: (lengths, len(at))}
    entries = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, (value, count) in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", lists_at + len(lists))
    return head + parts.tobytes() + lists + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(
    words: npt.NDArray[np.unsignedinteger], masks: tuple[int, int, int, int], header: int = 124, packing: int = 3
) -> bytes:
    """A BMP whose pixels are numbers of 16 or 32 bits, with masks for red, green, blue and alpha."""
    height, width = words.shape
    bits = words.dtype.itemsize * 8
    stored = words[::-1].astype(words.dtype.newbyteorder("<")).view(np.uint8).reshape(height, -1)
    body = np.pad(stored, ((0, 0), (0, -stored.shape[1] % 4))).tobytes()
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, packing, len(body), 0, 0, 0, 0)
    behind = 12 if packing == 3 else 16 if packing == 6 else 0  # of a header too short for masks
    head += struct.pack("<4I", *masks)
    head = head[: header + behind] if header == 40 else head[:header].ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


def undecodable() -> dict[str, list[bytes]]:
    """Files that are no picture for anybody, by cause: of every kind that is read, and what a parser falls over."""
    jpeg, png_file, tiff_file, avif, webp, gif, bmp_file = (
        saved(picture(40, 45), kind) for kind in ("JPEG", "PNG", "TIFF", "AVIF", "WEBP", "GIF", "BMP")
    )
    progressive = saved(picture(40, 45), "JPEG", progressive=True)
    flipped = bytearray(png_file)
    flipped[png_file.index(b"IDAT") + 9] ^= 16
    scan, hole = jpeg.index(b"\xff\xda") + 60, 90
    return {
        "empty": [b""],
        "unknown_format": [b"<!DOCTYPE html><title>Not found</title>", b"%PDF-1.7\n", bytes(1000), b"no picture"],
        "too_many_pixels": [
            png(60_000, 60_000, 8, 2, b"small"),
            gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
            bmp_file[:18] + struct.pack("<ii", 60_000, 60_000) + bmp_file[26:],
        ],
        "truncated": [
            *(data[:-100] for data in (jpeg, png_file, tiff_file, avif, webp, bmp_file)),
            gif[: len(gif) // 2],
            progressive[: progressive.rindex(b"\xff\xc4")] + b"\xff\xd9",
            png(45, 40, 8, 2, bytes(20 * (3 * 45 + 1))),
        ],
        "corrupt": [
            bytes(flipped),
            jpeg[:scan] + jpeg[scan + hole :],
            png(0, 40, 8, 2, b""),
            png(45, 40, 8, 3, bytes(46 * 40)),
            tiff_file[:4] + struct.pack("<I", 9) + tiff_file[8:],
            webp[:20] + bytes(50) + webp[70:],
            avif[:40] + bytes(50) + avif[90:],
        ],
        "unsupported": [
            *(saved(Image.new(mode, (40, 40)), "TIFF") for mode in "FI"),
            *(saved(picture(40, 45), kind) for kind in ("JPEG2000", "TGA", "ICO", "PPM")),
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            b'<svg xmlns="http://www.w3.org/2000/svg"/>',
            b"8BPS\0\1" + bytes(20),
            b"\xff\x0a" + bytes(20),
        ],
    }


# Primaries of Adobe RGB (1998) and Display P3, adapted to D50, by row: X, Y, Z of red, green, blue.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


def matrix_profile(primaries: npt.NDArray[np.float64], gamma: float) -> bytes:
    """An ICC display profile of three primaries and one gamma."""

    def xyz(values: Any) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    tags |= {name + b"XYZ": xyz(primaries[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    return _profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    return _profile(b"GRAY", {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": white, b"kTRC": curve})


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + body


def to_srgb(pixels: Pixels, primaries: npt.NDArray[np.float64], gamma: float) -> npt.NDArray[np.float64]:
    """What a colour of those primaries looks like in sRGB, by the textbook."""
    linear = np.linalg.inv(SRGB) @ primaries @ ((pixels / 255.0) ** gamma).reshape(-1, 3).T
    linear = linear.clip(0, 1)
    out = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * out.T).reshape(pixels.shape)

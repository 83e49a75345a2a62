"""Writes the shape world as a corpus: a folder of images and a Parquet file of captions, difficult on purpose.

Some files are valid but unusual (16 bits, CMYK, palette with alpha, rotated by EXIF), some must be rejected (truncated,
a decompression bomb, too small, no image at all), and some are exact duplicates.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image as PilImage

from data_prep.shapes.world import COLOURS, SHARES, Image, Scene, captions, coverage, render, sample_scene

# How many of each in every run of 200 images; the rest are plain JPEG and PNG files.
CYCLE = 200
GOOD = {"rgb16": 2, "grey16": 1, "cmyk": 2, "rotated": 2, "palette": 2}
BAD = {"truncated": 2, "bomb": 1, "tiny": 1, "not_an_image": 1}
DUPLICATES = 2
TINY = 8  # px
BOMB = 30_000  # px that the bomb's header declares for its side


def write_corpus(
    folder: Path, count: int, seed: int, size: int = 64, shares: Mapping[str, float] = SHARES
) -> dict[str, list[str]]:
    """Write `images/` and `captions.parquet`; return the images' paths by kind of file.

    Image i depends on (seed, i) alone, so a larger corpus begins with the smaller one.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str | bool]] = []
    by_kind: dict[str, list[str]] = {}
    for index in range(count):
        kind = kind_of(index, seed)
        subject = index - 1 if kind == "duplicate" else index
        rng = random.Random(f"{seed}/{subject}")
        scene = sample_scene(rng, shares)
        texts = captions(scene, rng, colourless=kind == "grey16")
        data, suffix = encode("plain" if kind == "duplicate" else kind, scene, size, rng)
        name = f"images/{index:06d}.{suffix}"
        (folder / name).write_bytes(data)
        by_kind.setdefault(kind, []).append(name)
        columns = {"caption_short": texts.short, "caption": texts.medium, "caption_long": texts.long}
        rows.append({"image": name, **columns, "task": scene.kind, "coloured": kind != "grey16"})
    table = pa.Table.from_pylist(rows, schema=_COLUMNS)
    for name, value in (("licence", "CC0-1.0"), ("source", f"shape-world-{seed}")):
        table = table.append_column(name, pa.array([value] * count, pa.string()))
    pq.write_table(table, folder / "captions.parquet")
    return by_kind


_COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("image", "caption_short", "caption", "caption_long", "task")]
    + [("coloured", pa.bool_())]
)


def kind_of(index: int, seed: int) -> str:
    return _cycle(index // CYCLE, seed)[index % CYCLE]


@lru_cache(maxsize=64)
def _cycle(number: int, seed: int) -> list[str]:
    """The kinds of CYCLE consecutive files; a duplicate comes right after the plain file that it repeats."""
    groups = [[kind] for kind, times in (GOOD | BAD).items() for _ in range(times)]
    groups += [["plain", "duplicate"]] * DUPLICATES
    groups += [["plain"]] * (CYCLE - sum(len(group) for group in groups))
    random.Random(f"{seed}/kinds/{number}").shuffle(groups)
    return [kind for group in groups for kind in group]


# ------------------------------------------------------------------------------------------------- files


def encode(kind: str, scene: Scene, size: int, rng: random.Random) -> tuple[bytes, str]:
    """The scene as a file of this kind: its bytes, and the suffix of its name."""
    if kind == "palette":
        return _palette_png(scene, size), "png"
    if kind == "bomb":
        return _png(BOMB, BOMB, 8, 2, bytes(4096)), "png"
    if kind == "not_an_image":
        return b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>\n", "jpg"
    image = render(scene, TINY if kind == "tiny" else size)
    if kind == "rgb16":
        return _png(size, size, 16, 2, image.astype(">u2") * np.uint16(257)), "png"
    if kind == "grey16":
        grey = image.min(axis=-1)  # dark on white for every colour
        return _png(size, size, 16, 0, grey.astype(">u2") * np.uint16(257)), "png"
    if kind == "cmyk":
        return _pillow_jpeg(PilImage.fromarray(image).convert("CMYK")), "jpg"
    if kind == "rotated":
        return _rotated_jpeg(image, rng), "jpg"
    if kind == "plain" and rng.random() < 0.3:
        return _png(size, size, 8, 2, image), "png"
    data = simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444")
    return (data[: len(data) * rng.randint(50, 80) // 100] if kind == "truncated" else data), "jpg"


def _png(
    width: int, height: int, depth: int, colour_type: int, pixels: npt.NDArray[np.generic] | bytes, extra: bytes = b""
) -> bytes:
    """A PNG file with `extra` chunks before the pixels. Pillow writes no 16-bit colour and is several times slower."""
    if not isinstance(pixels, bytes):
        rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
        pixels = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # filter 0 before each row
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(pixels, 1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _palette_png(scene: Scene, size: int) -> bytes:
    """Indexed colours on a transparent black background: a decoder that drops the alpha gives black, not white."""
    levels = 32
    index = np.zeros((size, size), np.uint8)
    colours, alphas = [(0, 0, 0)], [0]
    for thing in scene.things:
        level = np.rint(coverage(thing, size) * levels).astype(np.uint8)
        index = np.where(level > 0, level + np.uint8(len(colours) - 1), index)
        colours += [COLOURS[thing.colour]] * levels
        alphas += [255 * k // levels for k in range(1, levels + 1)]
    palette = bytes(channel for colour in colours for channel in colour)
    return _png(size, size, 8, 3, index, _chunk(b"PLTE", palette) + _chunk(b"tRNS", bytes(alphas)))


def _pillow_jpeg(image: PilImage.Image, orientation: int = 1) -> bytes:
    exif = PilImage.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


# EXIF orientation -> the quarter turns by which the stored pixels differ from the upright image.
TURNS = {3: 2, 6: 1, 8: 3}


def _rotated_jpeg(image: Image, rng: random.Random) -> bytes:
    orientation = rng.choice(list(TURNS))
    return _pillow_jpeg(PilImage.fromarray(np.rot90(image, TURNS[orientation])), orientation)

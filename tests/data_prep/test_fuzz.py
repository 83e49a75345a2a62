"""Whatever the bytes: a picture or a typed rejection, never an exception, and never more memory or time than said."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images import kinds
from data_prep.images.decode import decode
from data_prep.rejections import Cause, Rejection
from tests.data_prep import zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # damaged metadata is what this is about

PICTURE = zoo.picture()
DRAWING = Image.fromarray(PICTURE)
MIB = 1 << 20


# --- any bytes ---------------------------------------------------------------------------------------------------


def _seeds() -> dict[str, bytes]:
    profile, turned = zoo.matrix_profile(zoo.ADOBE, 2.2), Image.fromarray(PICTURE[::-1])
    bits, inks = Image.fromarray(PICTURE[:, :, 0] > 99), DRAWING.convert("CMYK")
    clear = np.dstack([PICTURE, PICTURE[:, :, :1]])
    jpegs = {
        "plain": zoo.saved(PICTURE, "JPEG", exif=zoo.exif(6)),
        "progressive": zoo.saved(PICTURE, "JPEG", progressive=True),
        "restarts": zoo.saved(PICTURE, "JPEG", restart_marker_blocks=1),
        "cmyk": zoo.saved(inks, "JPEG", icc_profile=profile, exif=zoo.exif(7)),
        "icc": zoo.saved(PICTURE, "JPEG", icc_profile=profile),
        "grey": zoo.saved(PICTURE[:, :, 0], "JPEG", icc_profile=zoo.grey_profile(1.0)),
    }
    extra = zoo.chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)) + zoo.chunk(b"eXIf", zoo.exif(6).tobytes()[6:])
    pngs = {
        "png": zoo.saved(PICTURE, "PNG"),
        "palette": zoo.saved(DRAWING.quantize(16), "PNG", transparency=3),
        "deep": zoo.png(40, 24, 16, 6, clear.astype(">u2"), extra),
        "apng": zoo.saved(DRAWING, "PNG", save_all=True, append_images=[turned]),
    }
    tiffs = {
        name: zoo.saved(image, "TIFF", compression=name, exif=zoo.exif(5), icc_profile=profile)
        for name, image in {
            "tiff_lzw": DRAWING,
            "tiff_adobe_deflate": DRAWING,
            "jpeg": DRAWING,
            "packbits": inks,
            "group4": bits,
            "zstd": Image.fromarray(clear),
        }.items()
    }
    rest = {
        "tiff": zoo.tiff(40, 24, 3, PICTURE.reshape(1, -1)),
        "tiles": zoo.tiff(16, 16, 3, PICTURE[:16, :16].reshape(1, -1), (16, 16)),
        "gif": zoo.saved(DRAWING, "GIF", save_all=True, append_images=[turned], comment=b"said"),
        "bmp": zoo.saved(PICTURE, "BMP"),
        "bmp_palette": zoo.saved(DRAWING.quantize(16), "BMP"),
        "webp": zoo.saved(PICTURE, "WEBP"),
        "lossless": zoo.saved(clear, "WEBP", lossless=True, exif=zoo.exif(3), icc_profile=profile),
        "webp_frames": zoo.saved(DRAWING, "WEBP", save_all=True, append_images=[turned]),
        "avif": zoo.saved(clear, "AVIF", icc_profile=profile, exif=zoo.exif(5)),
        "avif_frames": zoo.saved(DRAWING, "AVIF", save_all=True, append_images=[turned]),
    }
    return jpegs | pngs | tiffs | rest


SEEDS = _seeds()
NUMBERS = st.sampled_from([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\1"])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Bits flipped, numbers made huge, parts cut out, repeated and put in, the end missing."""
    data = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])

    def place() -> int:
        return draw(st.integers(0, len(data)) | st.integers(0, min(100, len(data))))

    for damage in draw(st.lists(st.sampled_from(["bits", "number", "cut", "repeat", "insert", "end"]), max_size=4)):
        at = place()
        if damage == "bits" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif damage == "number":
            value = draw(NUMBERS)
            data[at : at + len(value)] = value
        elif damage == "cut":
            del data[at : at + draw(st.integers(0, 400))]
        elif damage == "repeat":
            here = place()
            data[at:at] = data[here : here + draw(st.integers(1, 400))] * draw(st.integers(1, 30))
        elif damage == "insert":
            data[at:at] = draw(st.binary(max_size=200))
        elif damage == "end":
            del data[at:]
    return bytes(data)


@st.composite
def spliced(draw: st.DrawFn) -> bytes:
    one, other = (SEEDS[draw(st.sampled_from(sorted(SEEDS)))] for _ in range(2))
    return one[: draw(st.integers(0, len(one)))] + other[draw(st.integers(0, len(other))) :]


@st.composite
def nonsense(draw: st.DrawFn) -> bytes:
    start = SEEDS[draw(st.sampled_from(sorted(SEEDS)))][: draw(st.integers(0, 64))]
    return start + draw(st.binary(max_size=300))


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_whole(name: str) -> None:
    assert not isinstance(decode(SEEDS[name]), Rejection)


# All that a detail can say. Numbers are left out: they are those of the file.
DETAILS = {
    Cause.EMPTY: [""],
    Cause.TOO_MANY_PIXELS: ["# x # pixels", "a frame of too many pixels"],
    Cause.TRUNCATED: [
        "JPEG that ends before its picture does",
        "JPEG without its last scans",
        "PNG that ends within a chunk",
        "PNG without an end",
        "PNG with fewer rows than it promises",
        "TIFF that ends before its picture does",
        *(f"{kind} that ends early" for kind in ("GIF", "WEBP", "BMP", "AVIF")),
    ],
    Cause.CORRUPT: [
        "# x # pixels",
        "JPEG of more than # segments",
        "JPEG of more than # scans",
        "JPEG with damage in its picture",
        "PNG chunk with a wrong checksum",
        "PNG of more than # chunks",
        "PNG that does not begin with its header",
        "PNG of palette colours without a palette",
        "PNG with a frame beyond its canvas",
        "TIFF with tiles far larger than the picture",
        "TIFF with JPEGs far larger than the picture",
        "TIFF with damage in its picture",
        "BMP with masks beyond its bits",
        *(f"{kind} with damage" for kind in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "AVIF")),
    ],
    Cause.UNSUPPORTED: [
        "JPEG of # bits a sample",
        "JPEG of unusual sampling",
        "JPEG with another coding than Huffman's, or lossless",
        "PNG as Xcode packs it",
        "TIFF of samples that are not read",
        "TIFF of a compression that is not read",
        "TIFF of values without a fixed range",
        "BMP of a kind that is not read",
        *(f"{name} is not read" for _, name in kinds._PICTURES),
        *(f"{name} is not read" for name in ("PNM", "HEIC", "SVG", "TGA", "DIB")),
    ],
    Cause.UNKNOWN_FORMAT: [
        *(name for _, name in kinds._NO_PICTURES),
        *("HTML", "XML", "JSON", "nothing but zeros", "no picture of a known kind"),
    ],
}


@settings(max_examples=1200)
@given(damaged() | spliced() | nonsense())
def test_any_bytes_give_a_picture_or_a_typed_rejection(data: bytes) -> None:
    decoded = decode(data, max_pixels=1_000_000)
    if isinstance(decoded, Rejection):
        # A text of ours: what a library says names objects in memory, and two runs would write other bytes.
        assert re.sub(r"-?\d+", "#", decoded.detail) in DETAILS[decoded.cause]
    else:
        height, width, channels = decoded.pixels.shape
        assert channels == 3
        assert 0 < height * width <= 1_000_000
        assert decoded.pixels.dtype == np.uint8
        assert decoded.pixels.flags.c_contiguous
        assert decoded.pixels.flags.writeable


# --- memory and time ---------------------------------------------------------------------------------------------


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    at = next(data.index(bytes([0xFF, marker])) for marker in (0xC0, 0xC2) if bytes([0xFF, marker]) in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def _gif_frame(data: bytes) -> int:
    """Where the first frame begins: a comma may stand among the colours before it."""
    return data.index(b",", 13 + (3 << 1 + (data[10] & 7)))


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def with_tiff_tags(values: dict[int, int]) -> bytes:
    data = bytearray(SEEDS["tiles"])
    for tag, value in values.items():
        at = data.index(struct.pack("<HHI", tag, 4, 1))
        data[at + 8 : at + 12] = struct.pack("<I", value)
    return bytes(data)


def too_many_pixels() -> dict[str, bytes]:
    webp = zoo.saved(np.dstack([PICTURE, PICTURE[:, :, :1]]), "WEBP")
    gif, bmp, avif = zoo.saved(PICTURE, "GIF"), SEEDS["bmp"], zoo.saved(PICTURE, "AVIF")
    return {
        "png": zoo.png(30_000, 30_000, 8, 2, bytes(4096)),
        "jpeg": with_jpeg_size(SEEDS["plain"], 65_500, 65_500),
        "progressive jpeg": with_jpeg_size(SEEDS["progressive"], 65_500, 65_500),
        "webp canvas": patched(webp, webp.index(b"VP8X") + 12, b"\xff\x3f\0" * 2),
        "gif screen": patched(gif, 6, b"\xff\xff" * 2),
        "gif frame": patched(gif, _gif_frame(gif) + 5, b"\xff\xff" * 2),
        "bmp": patched(bmp, 18, struct.pack("<ii", 60_000, 60_000)),
        "tiff": with_tiff_tags({256: 60_000, 257: 60_000}),
        "avif": patched(avif, avif.index(b"ispe") + 8, struct.pack(">II", 15_000, 15_000)),
    }


def zeros(size: int) -> bytes:
    """Compressed a thousandfold."""
    press = zlib.compressobj(9)
    return b"".join([*(press.compress(bytes(MIB)) for _ in range(size // MIB)), press.flush()])


def exif_of_many_tags(order: str = "<") -> bytes:
    """Every tag names the same four megabytes."""
    tags = b"".join(struct.pack(order + "HHII", tag, 7, 4 * MIB, 8) for tag in range(1, 60_000))
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IH", 8, 59_999) + tags + bytes(4 * MIB + 4)


def in_png(*chunks: bytes) -> bytes:
    whole = zoo.saved(PICTURE, "PNG")
    at = whole.index(b"IDAT") - 4
    return whole[:at] + b"".join(chunks) + whole[at:]


def in_jpeg(segments: bytes) -> bytes:
    return SEEDS["plain"][:2] + segments + SEEDS["plain"][2:]


def jpeg_of_scans(side: int, count: int) -> bytes:
    whole = zoo.saved(np.zeros((side, side), np.uint8), "JPEG", progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[at:-2] * count + whole[-2:]


def webp_of_frames(count: int) -> bytes:
    still = zoo.saved(PICTURE[:8, :8], "WEBP", lossless=True)[12:]
    frame = bytes(6) + b"\7\0\0" * 2 + b"\1\0\0\0" + still + bytes(len(still) % 2)
    frames = (b"ANMF" + struct.pack("<I", len(frame)) + frame) * count
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\7\0\0" * 2 + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body + frames)) + body + frames


def gif_of_frames(count: int) -> bytes:
    whole = zoo.saved(Image.new("P", (4, 4)), "GIF")
    return whole[:-1] + whole[_gif_frame(whole) : -1] * count + b";"


def tiff_of_frames(count: int) -> bytes:
    whole = SEEDS["tiff"]
    (at,) = struct.unpack_from("<I", whole, 4)
    directory = whole[at:-4]
    ends = (len(whole) + (len(directory) + 4) * number for number in range(count))
    return whole[:-4] + b"".join(struct.pack("<I", end) + directory for end in ends) + bytes(4)


def tiff_of_jpegs(jpeg: bytes, count: int) -> bytes:
    """Tiles that are all the same JPEG."""
    part = np.frombuffer(jpeg, np.uint8)[None]
    data = bytearray(zoo.tiff(1000, 1000, 1, part, (1008, 1008)))
    data[data.index(struct.pack("<HHII", 259, 4, 1, 1)) + 8] = 7
    data[data.index(struct.pack("<HHII", 262, 4, 1, 2)) + 8] = 1
    at = data.index(struct.pack("<HHI", 324, 4, 1))
    where, lengths = len(data), len(data) + 4 * count
    data[at : at + 12] = struct.pack("<HHII", 324, 4, count, where)
    at = data.index(struct.pack("<HHI", 325, 4, 1))
    data[at : at + 12] = struct.pack("<HHII", 325, 4, count, lengths)
    return bytes(data) + struct.pack("<I", 8) * count + struct.pack("<I", len(jpeg)) * count


def bombs() -> dict[str, bytes]:
    """Small files, or cheap ones, that have cost some decoder a gigabyte or a minute."""
    profile = zoo.matrix_profile(zoo.ADOBE, 2.2)
    head = struct.pack("<iiHHIIiiII", 8000, 8000, 1, 8, 1, 0, 0, 0, 256, 0)
    icc = [b"\xff\xe2\xff\xffICC_PROFILE\0" + bytes([number, 255]) + bytes(65519) for number in range(1, 256)]
    webp = zoo.saved(PICTURE, "WEBP", lossless=True, exif=zoo.exif(6))
    many = exif_of_many_tags()
    webp = webp[: webp.index(b"EXIF")] + b"EXIF" + struct.pack("<I", len(many)) + many
    return {
        "png profile": in_png(zoo.chunk(b"iCCP", b"x\0\0" + zeros(128 * MIB))),
        "png text": in_png(zoo.chunk(b"zTXt", b"x\0\0" + zeros(128 * MIB))),
        "png texts": in_png(*[zoo.chunk(b"zTXt", b"x\0\0" + zeros(MIB - 1))] * 200),
        "png international text": in_png(zoo.chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(128 * MIB))),
        "png pixels": zoo.png(8, 8, 8, 2, bytes(128 * MIB)),
        "png chunks": in_png(zoo.chunk(b"tEXt", b"a\0b") * 500_000),
        "png empty pixels": in_png(zoo.chunk(b"IDAT", b"") * 500_000),
        "png exif": in_png(zoo.chunk(b"eXIf", many)),
        "jpeg segments": in_jpeg(b"\xff\xfe\0\2" * 2_000_000),
        "jpeg fill": in_jpeg(b"\xff" * 10_000_000),
        "jpeg tables": in_jpeg((b"\xff\xdb\0\x43\0" + bytes(range(1, 65))) * 100_000),
        "jpeg exif": in_jpeg(b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + many[:60_000]),
        "jpeg profile": in_jpeg(b"".join(icc)),
        "jpeg scans": jpeg_of_scans(2000, 20_000),
        "jpeg allowed scans": jpeg_of_scans(2000, 80),
        "gif comment": SEEDS["gif"].replace(b"\4said", b"\4said" + (b"\xff" + b"x" * 255) * 40_000, 1),
        "gif frames": gif_of_frames(100_000),
        "webp frames": webp_of_frames(100_000),
        "webp exif": b"RIFF" + struct.pack("<I", len(webp) - 8) + webp[8:],
        "avif exif": zoo.saved(PICTURE, "AVIF", exif=many),
        "tiff frames": tiff_of_frames(50_000),
        "tiff strips": SEEDS["tiff"].replace(struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 1 << 28)),
        "tiff tiles": with_tiff_tags({322: 1 << 20, 323: 1 << 10, 259: 8}),
        "tiff samples": with_tiff_tags({277: 1 << 30}),
        "tiff tags": many,
        "black png": zoo.png(3000, 3000, 8, 0, bytes(3001 * 3000)),  # its rows are counted
        "bmp masks": zoo.bmp(np.zeros((4000, 1000), np.uint32), (255, 1 << 9, 1 << 31, 1 << 30)),
        "tiff of jpegs": tiff_of_jpegs(jpeg_of_scans(1000, 2000), 20),
        "bmp runs": b"BM" + struct.pack("<IHHII", 0, 0, 0, 1078, 40) + head + bytes(1024) + bytes(4_000_000),
        "icc tags": zoo.saved(PICTURE, "PNG", icc_profile=profile[:128] + struct.pack(">I", 100) + bytes(4_000_000)),
    }


REFUSED = (
    "png chunks",
    "png empty pixels",
    "jpeg segments",
    "jpeg tables",
    "jpeg scans",
    "tiff tiles",
    "tiff samples",
    "tiff of jpegs",
)
SIDE = 1600


def dear() -> dict[str, bytes]:
    """Honest files, whose decoding takes the most memory a pixel that each format can."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIDE // 8, SIDE, 4), dtype=np.uint8)
    clear = np.tile(noise, (8, 1, 1))
    rgb, grey, inks = (
        np.ascontiguousarray(clear[:, :, :3]),
        np.ascontiguousarray(clear[:, :, 0]),
        Image.fromarray(clear, "CMYK"),
    )
    said = {"icc_profile": zoo.matrix_profile(zoo.ADOBE, 2.2), "exif": zoo.exif(6).tobytes()}
    extra = zoo.chunk(b"iCCP", b"x\0\0" + zlib.compress(said["icc_profile"])) + zoo.chunk(b"eXIf", said["exif"][6:])
    return {
        "jpeg": zoo.saved(rgb, "JPEG", subsampling=0, progressive=True, **said),
        "grey jpeg": zoo.saved(grey, "JPEG", icc_profile=zoo.grey_profile(1.0), exif=said["exif"]),
        "cmyk jpeg": zoo.saved(inks, "JPEG", progressive=True, **said),
        "png": zoo.saved(clear, "PNG", compress_level=1, **said),
        "deep png": zoo.png(SIDE, SIDE, 16, 6, np.zeros((SIDE, SIDE, 4), ">u2"), extra),
        "palette png": zoo.saved(
            Image.fromarray(grey, "P"), "PNG", transparency=3, compress_level=1, exif=said["exif"]
        ),
        "gif": zoo.saved(Image.fromarray(grey, "P"), "GIF", transparency=3),
        "webp": zoo.saved(clear, "WEBP", quality=10, method=0, **said),
        "lossless webp": zoo.saved(clear, "WEBP", lossless=True, quality=0, method=0, **said),
        "plain webp": zoo.saved(rgb, "WEBP", quality=10, method=0),
        "avif": zoo.saved(clear, "AVIF", quality=10, speed=10, subsampling="4:4:4", **said),
        "tiff": zoo.saved(clear, "TIFF", **said),
        "lzw tiff": zoo.saved(clear, "TIFF", compression="tiff_lzw", **said),
        "bmp": zoo.saved(rgb, "BMP"),
    }


RUNNER = """
import json, os, resource, sys, time
from data_prep.images.decode import Decoded, decode
from tests.data_prep.test_fuzz import SEEDS

for seed in SEEDS.values():
    decode(seed)  # what is loaded once is not counted


def memory(what):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))


def cost(path):
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    data = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before, start = memory("VmRSS"), time.process_time()
    found = decode(data)
    seconds = time.process_time() - start
    said = "picture" if isinstance(found, Decoded) else found.cause.value
    return [memory("VmHWM") - before, seconds, said]


for path in sys.argv[1:]:
    child = os.fork()  # each with memory of its own, that it cannot have taken before
    if child == 0:
        print(json.dumps([os.path.basename(path), *cost(path)]), flush=True)
        os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        print(json.dumps([os.path.basename(path), 0, 0, f"killed, status {status}"]), flush=True)
"""


class Cost(NamedTuple):
    memory: int
    seconds: float
    outcome: str


def costs_of(folder: Path, files: dict[str, bytes]) -> dict[str, Cost]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", RUNNER, *(str(folder / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name: Cost(*cost) for name, *cost in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == files.keys()
    return found


def test_too_many_pixels_are_refused_from_the_header_before_any_memory_is_taken(tmp_path: Path) -> None:
    files = too_many_pixels()
    for name, cost in costs_of(tmp_path, files).items():
        assert len(files[name]) < 300_000, name
        assert cost.outcome == Cause.TOO_MANY_PIXELS, name
        assert cost.memory < 20 * MIB, name
        assert cost.seconds < 0.5, name


def test_bombs_cost_no_more_than_files_of_their_length(tmp_path: Path) -> None:
    files = bombs()
    for name, cost in costs_of(tmp_path, files).items():
        assert not cost.outcome.startswith("killed"), name
        if name in REFUSED:
            assert cost.outcome == Cause.CORRUPT, name
        elif name.startswith(("png", "jpeg exif", "jpeg fill", "webp", "avif", "gif")):
            assert cost.outcome == "picture", (name, cost)
        allowed = 24 * 9_000_000 if name in ("black png", "bmp masks") else 0
        allowed = 24 * 4_000_000 if "scans" in name else 24 * 64_000_000 if name == "bmp runs" else allowed
        assert cost.memory < allowed + 3 * len(files[name]) + 64 * MIB, (name, cost)
        assert cost.seconds < (20 if name == "jpeg allowed scans" else 2), (name, cost)


def test_the_memory_cap_holds_for_every_format(tmp_path: Path) -> None:
    files = dear()
    for name, cost in costs_of(tmp_path, files).items():
        assert cost.outcome == "picture", name
        assert cost.memory < 24 * SIDE * SIDE + 3 * len(files[name]) + 16 * MIB, (name, cost.memory / SIDE / SIDE)

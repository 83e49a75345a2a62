"""Broken pictures are refused and whole ones taken, and the cause says which of it and why. All damage is made here."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.images import jpeg
from data_prep.images.decode import decode
from data_prep.rejections import Cause, Refused, Rejection
from tests.data_prep import zoo
from tests.data_prep.test_decode import CLOSE, assert_same, cause_of, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # damaged metadata is what this is about

PICTURE = zoo.picture()
PHOTO = zoo.photograph(1, 60, 80)


# --- JPEG --------------------------------------------------------------------------------------------------------

JPEGS = {
    "baseline": zoo.saved(PHOTO, "JPEG"),
    "progressive": zoo.saved(PHOTO, "JPEG", progressive=True),
    "grey": zoo.saved(PHOTO[:, :, 0], "JPEG"),
    "restarts": zoo.saved(PHOTO, "JPEG", restart_marker_blocks=2),
    "cmyk": zoo.saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", progressive=True),
}


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def before_scan(data: bytes, extra: bytes) -> bytes:
    """`extra` stands before the first quantisation table."""
    at = data.index(b"\xff\xdb")
    return data[:at] + extra + data[at:]


HARMLESS: dict[str, Callable[[bytes], bytes]] = {
    "bytes before a marker": lambda data: before_scan(data, b"junk"),
    "zeros before a marker": lambda data: before_scan(data, b"\xff\0" * 3),
    "a part of no profile": lambda data: before_scan(data, segment(0xE2, b"ICC_PROFILE\0" + bytes(9))),
    "a profile in parts that are not all there": lambda data: before_scan(
        data, segment(0xE2, b"ICC_PROFILE\0\2\3" + bytes(99))
    ),
    "EXIF longer than it says": lambda data: before_scan(data, segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08") + b"\0\3rest"),
    "an Adobe marker that is too short": lambda data: before_scan(data, segment(0xE3, b"Adobe\0d\0") + b"\1"),
    "a version of JFIF that there is none of": lambda data: data.replace(b"JFIF\0\1\1", b"JFIF\0\x09\1", 1),
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("harm", HARMLESS)
def test_a_warning_from_before_the_scan_says_nothing_against_a_jpeg(name: str, harm: str) -> None:
    data = JPEGS[name]
    found = HARMLESS[harm](data)
    assert name == "cmyk" or found != data
    assert_same(pixels_of(found), pixels_of(data))


@pytest.mark.parametrize("name", ["baseline", "grey", "restarts"])
def test_what_a_scan_says_of_its_coefficients_counts_in_a_progressive_jpeg_alone(name: str) -> None:
    data = JPEGS[name]
    at = data.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    odd = data[: end - 3] + b"\x05\x07\x11" + data[end:]
    with pytest.raises(ValueError, match="sequential"):
        simplejpeg.decode_jpeg(odd)
    assert_same(pixels_of(odd), pixels_of(data))


def test_each_of_these_is_warned_of() -> None:
    for harm in HARMLESS.values():
        with pytest.raises(ValueError, match=r"[Jj]unk|extraneous|bad ICC|JFIF"):
            simplejpeg.decode_jpeg(harm(JPEGS["baseline"]))


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_nothing_but_its_end_is_whole(name: str) -> None:
    data = JPEGS[name]
    for cut in (1, 2):
        assert_same(pixels_of(data[:-cut]), pixels_of(data))
    for cut in range(3, 40):
        assert cause_of(data[:-cut]) is Cause.TRUNCATED


def scans(data: bytes) -> list[int]:
    """Where the scans of a progressive JPEG end."""
    found = list(jpeg.segments(data))
    return [after.at for one, after in itertools.pairwise(found) if one.marker == 0xDA]


@pytest.mark.parametrize("name", ["progressive", "cmyk"])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_jpeg_of_which_only_the_first_scans_are_there_is_truncated(name: str, end: bytes) -> None:
    """Other decoders show a blurred picture, and no warning."""
    data = JPEGS[name]
    ends = scans(data)
    assert len(ends) >= 6
    for at in ends[:-1]:
        assert decode(data[:at] + end) == Rejection(Cause.TRUNCATED, "JPEG without its last scans")
    assert_same(pixels_of(data[: data.rindex(b"\xff\xd9")] + end), pixels_of(data))


def test_a_jpeg_with_a_scan_for_each_colour_needs_all_of_them() -> None:
    head = segment(0xC0, b"\x08\0\x08\0\x08\3" + b"\1\x11\0\2\x11\1\3\x11\1")
    of_colour = [segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + b"\x12" for number in (1, 2, 3)]
    jpeg.read(b"\xff\xd8" + head + b"".join(of_colour) + b"\xff\xd9")
    for missing in of_colour:
        with pytest.raises(Refused) as found:
            jpeg.read(b"\xff\xd8" + head + b"".join(scan for scan in of_colour if scan != missing) + b"\xff\xd9")
        assert found.value.rejection.cause is Cause.TRUNCATED


@pytest.mark.parametrize("name", JPEGS)
def test_damage_within_a_scan_is_refused(name: str) -> None:
    data = JPEGS[name]
    found = list(jpeg.segments(data))
    start, end = next((one.end, after.at) for one, after in itertools.pairwise(found) if one.marker == 0xDA)
    middle = (start + end) // 2
    assert cause_of(data[:middle] + data[end:]) is Cause.CORRUPT, "the rest of a scan is missing"
    assert cause_of(data[:end] + b"\x12" * 20 + data[end:]) is Cause.CORRUPT, "a scan is longer than its picture"
    worse = before_scan(data, b"junk")
    assert cause_of(worse[: middle + 4] + worse[end + 4 :]) is Cause.CORRUPT, "a harmless warning hides no other"


def test_a_jpeg_without_huffmans_codes_is_unsupported() -> None:
    data = JPEGS["baseline"].replace(b"\xff\xc0", b"\xff\xc3", 1)
    assert cause_of(data) is Cause.UNSUPPORTED


# --- PNG ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), st.sampled_from(["L", "RGB"]), st.integers(0, 9))
def test_a_png_has_all_its_rows(height: int, width: int, interlaced: bool, mode: str, lacking: int) -> None:
    """Black or not: rows that are not there would be black."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    for pixels in (np.full(shape, 200, np.uint8), np.zeros(shape, np.uint8)):
        rows = zoo.rows_of(pixels, interlaced)
        cut = rows[: max(0, len(rows) - lacking)]
        whole = (
            zoo.interlaced_png(pixels, cut)
            if interlaced
            else zoo.png(width, height, 8, 2 if pixels.ndim == 3 else 0, cut)
        )
        if lacking:
            assert cause_of(whole) is Cause.TRUNCATED
        else:
            assert_same(pixels_of(whole), pixels if mode == "RGB" else pixels[:, :, None].repeat(3, 2))


@pytest.mark.parametrize(("depth", "colour_type"), [(1, 0), (2, 0), (4, 3), (8, 3), (16, 0), (8, 4), (16, 2), (16, 6)])
def test_rows_are_counted_at_every_depth(depth: int, colour_type: int) -> None:
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    rows = (b"\0" + b"\x11" * ((13 * bits + 7) // 8)) * 96
    palette = zoo.chunk(b"PLTE", bytes(range(9)) * 5 + bytes(3)) if colour_type == 3 else b""
    pixels_of(zoo.png(13, 96, depth, colour_type, rows, palette))
    for lacking in (1, len(rows) // 2):
        found = decode(zoo.png(13, 96, depth, colour_type, rows[:-lacking], palette))
        assert found == Rejection(Cause.TRUNCATED, "PNG with fewer rows than it promises")


def test_a_png_with_more_than_it_promises_is_whole() -> None:
    black = zoo.png(40, 24, 8, 0, bytes(41 * 24) + bytes(1000))
    assert_same(pixels_of(black), np.zeros((24, 40, 3)))


def test_a_png_of_palette_colours_needs_a_palette() -> None:
    index = np.zeros((4, 4), np.uint8)
    found = decode(zoo.png(4, 4, 8, 3, index))
    assert found == Rejection(Cause.CORRUPT, "PNG of palette colours without a palette")


# --- TIFF --------------------------------------------------------------------------------------------------------


def in_strips(data: bytes) -> Iterator[tuple[int, int]]:
    with Image.open(io.BytesIO(data)) as image:
        yield from zip(image.tag_v2[273], image.tag_v2[279], strict=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("packing", ["tiff_lzw", "group4", "jpeg"])
def test_a_tiff_with_a_damaged_strip_is_refused(packing: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow makes a picture of each of these, with rows that are black, or something else."""
    page = Image.fromarray(zoo.photograph(2, 200, 300)[:, :, 0] > 128)
    # Colours as differences from luma go through a part of libtiff that stops for no error.
    image = page if packing == "group4" else Image.fromarray(PHOTO).convert("YCbCr")
    data = bytearray(zoo.saved(image, "TIFF", compression=packing))
    pixels_of(bytes(data))
    at, size = next(in_strips(bytes(data)))
    middle = at + size // 2
    data[middle : middle + 24] = b"\xff\xd0" * 12 if packing == "jpeg" else b"\xff\xfe" * 12
    with Image.open(io.BytesIO(data)) as broken:
        broken.load()
    assert decode(bytes(data)) == Rejection(Cause.CORRUPT, "TIFF with damage in its picture")
    found = capfd.readouterr()
    assert "decode" not in found.err.lower(), "libtiff speaks to us, not to the terminal"
    pixels_of(zoo.saved(PICTURE, "TIFF", compression="tiff_lzw"))


def test_jpegs_in_a_tiff_are_no_larger_than_it() -> None:
    """Small strips, each of which would be gigabytes."""
    data = bytearray(zoo.saved(PHOTO, "TIFF", compression="jpeg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    assert cause_of(bytes(data)) is Cause.CORRUPT


def test_tiffs_that_are_valid_and_not_read_are_unsupported() -> None:
    shown = zoo.tiff(8, 8, 3, PICTURE[:8, :8].reshape(1, -1))

    def with_tag(tag: int, value: int) -> bytes:
        """One more tag, at its place among them."""
        (at,) = struct.unpack_from("<I", shown, 4)
        (count,) = struct.unpack_from("<H", shown, at)
        entries = [shown[at + 2 + 12 * n : at + 14 + 12 * n] for n in range(count)]
        entries = [entry for entry in entries if entry[:2] != struct.pack("<H", tag)]
        entries.append(struct.pack("<HHII", tag, 3, 1, value))
        entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
        return shown[:at] + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)

    pixels_of(shown)
    floats = np.zeros((8, 8, 3), "<f4")
    for data in (
        with_tag(339, 3),  # samples are floating-point numbers
        with_tag(258, 12),  # of 12 bits
        with_tag(259, 50001),  # packed as WebP
        zoo.tiff(8, 8, 3, floats.view(np.uint8).reshape(1, -1)).replace(
            struct.pack("<HHII", 258, 4, 1, 8), struct.pack("<HHII", 258, 4, 1, 32)
        ),
    ):
        assert cause_of(data) is Cause.UNSUPPORTED


def test_what_stops_a_decoder_does_not_stop_whoever_asks_why() -> None:
    head = zoo.png(4, 4, 8, 2, b"")
    for data in (
        head[:8] + zoo.chunk(b"IHDR", b"\0\0") + head[33:],  # too short a header
        b"\xff\xd8\xff\xc0\0\2" + b"\xff\xfe\0\2" * 5000 + b"\xff\xd9",  # too many segments
        b"\xff\xd8\xff",
        *(
            start + bytes(count)
            for start in (b"BM", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0", b"MM\0+")
            for count in range(40)
        ),
    ):
        assert cause_of(data) in (Cause.CORRUPT, Cause.TRUNCATED)


# --- cut files ---------------------------------------------------------------------------------------------------

CUT = {
    "webp": zoo.saved(PHOTO, "WEBP"),
    "lossless webp": zoo.saved(PHOTO, "WEBP", lossless=True),
    "webp with exif": zoo.saved(PHOTO, "WEBP", exif=zoo.exif(6)),
    "avif": zoo.saved(PHOTO, "AVIF"),
    "lzw tiff": zoo.saved(PHOTO, "TIFF", compression="tiff_lzw"),
    "deflated tiff": zoo.saved(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg tiff": zoo.saved(PHOTO, "TIFF", compression="jpeg"),
    "tiff": zoo.saved(PHOTO, "TIFF"),
    "tiff that ends with its directory": zoo.tiff(80, 60, 3, PHOTO.reshape(1, -1)),
    "gif": zoo.saved(PHOTO, "GIF"),
    "bmp": zoo.saved(PHOTO, "BMP"),
    "masked bmp": zoo.bmp(
        PHOTO.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32), (255 << 16, 255 << 8, 255, 0)
    ),
    "png": zoo.saved(PHOTO, "PNG"),
    "jpeg": zoo.saved(PHOTO, "JPEG"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_file_is_truncated(name: str) -> None:
    data = CUT[name]
    pixels_of(data)
    for share in (0.02, 0.1, 0.3, 0.5, 0.8, 0.97):
        assert cause_of(data[: max(40, int(share * len(data)))]) is Cause.TRUNCATED
    if name not in ("gif", "jpeg"):  # which may end earlier
        assert cause_of(data[:-5]) is Cause.TRUNCATED


def test_a_whole_file_with_damage_is_not_called_truncated() -> None:
    for name, at in (("webp", 20), ("lossless webp", 20), ("avif", 40)):
        data = bytearray(CUT[name])
        data[at : at + 50] = bytes(50)
        assert cause_of(bytes(data)) is Cause.CORRUPT


# --- BMP ---------------------------------------------------------------------------------------------------------


@given(st.permutations(range(4)), st.sampled_from([(5, 6, 5, 0), (5, 5, 5, 1), (4, 4, 4, 4), (2, 3, 1, 0)]), st.data())
def test_a_bmp_of_any_masks(order: list[int], widths: tuple[int, ...], data: st.DataObject) -> None:
    masks, shift = [0, 0, 0, 0], 0
    for place in order:
        masks[place] = ((1 << widths[place]) - 1) << shift
        shift += widths[place]
    words = np.array(data.draw(st.lists(st.integers(0, 65535), min_size=6, max_size=6)), np.uint16).reshape(2, 3)
    parts = [
        (words & mask) // (mask & -mask) * 255 / ((1 << width) - 1) if mask else None
        for mask, width in zip(masks, widths, strict=True)
    ]
    alpha = parts.pop()
    wanted = np.stack(parts, -1)  # type: ignore[arg-type]
    if alpha is not None and alpha.any():
        wanted = wanted * alpha[..., None] / 255 + 255 - alpha[..., None]
    assert_same(pixels_of(zoo.bmp(words, tuple(masks))), wanted, 1)  # type: ignore[arg-type]


def test_the_alpha_of_a_bmp_counts() -> None:
    words = np.array([[0x000A141E, 0xFF0A141E], [0x800A141E, 0x000A141E]], np.uint32)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    wanted = np.array([[[255] * 3, [10, 20, 30]], [[132, 137, 142], [255] * 3]])
    for header, packing in ((56, 3), (108, 3), (124, 3), (124, 0), (40, 6)):
        assert_same(pixels_of(zoo.bmp(words, masks, header, packing)), wanted, 1)
    opaque = np.broadcast_to([10, 20, 30], (2, 2, 3))
    for header, packing in ((40, 0), (40, 3), (52, 3)):  # they know of no alpha
        assert_same(pixels_of(zoo.bmp(words, masks, header, packing)), opaque)
    assert_same(pixels_of(zoo.bmp(words & np.uint32(0xFFFFFF), masks)), opaque)  # nor does who wrote zeros all over
    matte = pixels_of(zoo.bmp(words, masks), matte=(1, 2, 3))
    assert_same(matte[0], [[1, 2, 3], [10, 20, 30]])


def test_a_bmp_of_a_rare_kind_is_unsupported() -> None:
    data = zoo.saved(Image.fromarray(PICTURE).quantize(4), "BMP")
    for at, value in ((28, struct.pack("<H", 2)), (30, struct.pack("<I", 4)), (30, struct.pack("<I", 5))):
        assert cause_of(data[:at] + value + data[at + len(value) :]) is Cause.UNSUPPORTED
    assert cause_of(data[:28] + struct.pack("<H", 29) + data[30:]) is Cause.CORRUPT
    assert cause_of(zoo.bmp(np.zeros((2, 2), np.uint16), (0x10000, 1, 2, 0))) is Cause.CORRUPT


# --- first frames ------------------------------------------------------------------------------------------------

MATTE = (10, 200, 30)


def standing(frame: zoo.Pixels, height: int, width: int, left: int, top: int) -> zoo.Pixels:
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = MATTE
    canvas[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return canvas


def test_the_first_frame_of_a_gif_stands_on_transparency() -> None:
    few = Image.fromarray(np.arange(960, dtype=np.uint8).reshape(24, 40) % 4, "P")
    few.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200, 255, 255, 255])
    data = zoo.saved(few, "GIF")
    at = data.index(b",", 13 + 12)
    placed = data[:6] + struct.pack("<HH", 60, 50) + data[10 : at + 1] + struct.pack("<HH", 7, 5) + data[at + 5 :]
    assert_same(pixels_of(placed, matte=MATTE), standing(np.asarray(few.convert("RGB")), 50, 60, 7, 5))


def test_the_first_frame_of_a_webp_stands_on_transparency() -> None:
    still = zoo.saved(PICTURE, "WEBP", lossless=True)[12:]
    numbers = [3, 2, 39, 23, 100]  # the corner in steps of two, the sides less one, the duration
    frame = b"".join(struct.pack("<I", number)[:3] for number in numbers) + b"\0" + still
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + struct.pack("<I", 59)[:3] + struct.pack("<I", 49)[:3]
    body += b"ANIM" + struct.pack("<IIH", 6, 0xFF0000FF, 0) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    assert_same(pixels_of(data, matte=MATTE), standing(PICTURE, 50, 60, 6, 4))


def animated(canvas: zoo.Pixels, *chunks: tuple[bytes, bytes], first: bool = False) -> bytes:
    """An APNG: the picture for who shows no animation, and the chunks behind it."""
    data = zoo.png(canvas.shape[1], canvas.shape[0], 8, 2, canvas)
    at, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    head = zoo.chunk(b"acTL", struct.pack(">II", 1, 0))
    head += zoo.chunk(b"fcTL", frame_at(0, canvas, 0, 0)) if first else b""
    return data[:at] + head + data[at:end] + b"".join(zoo.chunk(*chunk) for chunk in chunks) + data[end:]


def frame_at(number: int, pixels: zoo.Pixels, left: int, top: int) -> bytes:
    return struct.pack(">5IHHBB", number, pixels.shape[1], pixels.shape[0], left, top, 1, 10, 0, 0)


def test_the_first_frame_of_an_apng_stands_on_transparency() -> None:
    canvas = np.full((50, 60, 3), 77, np.uint8)
    packed = zlib.compress(zoo.rows_of(PICTURE, False))
    frame = (b"fcTL", frame_at(0, PICTURE, 7, 5))
    parts = [(b"fdAT", struct.pack(">I", 1) + packed[:99]), (b"fdAT", struct.pack(">I", 2) + packed[99:])]
    later = [(b"fcTL", frame_at(3, canvas, 0, 0)), (b"fdAT", struct.pack(">I", 4) + zlib.compress(bytes(181 * 50)))]
    assert_same(pixels_of(animated(canvas, frame, *parts, *later), matte=MATTE), standing(PICTURE, 50, 60, 7, 5))
    assert_same(pixels_of(animated(canvas, frame, *parts, first=True)), canvas)  # the picture is the first frame
    assert_same(pixels_of(animated(canvas, *later[:1])), canvas)  # a frame without pixels
    assert cause_of(animated(canvas, frame, parts[0])) is Cause.TRUNCATED  # half of its pixels
    beyond = (b"fcTL", frame_at(0, PICTURE, 21, 5))
    assert cause_of(animated(canvas, beyond, *parts)) is Cause.CORRUPT
    assert cause_of(animated(canvas, frame, *parts), max_pixels=2000) is Cause.TOO_MANY_PIXELS


def test_the_first_frame_of_an_avif_stands_on_transparency() -> None:
    alpha = np.zeros((24, 40, 1), np.uint8)
    alpha[:, :20] = 255
    first, second = (Image.fromarray(np.dstack([pixels, alpha])) for pixels in (PICTURE, PICTURE[::-1]))
    data = zoo.saved(first, "AVIF", save_all=True, append_images=[second], quality=100, subsampling="4:4:4")
    found = pixels_of(data, matte=MATTE)
    assert_same(found[:, :18], PICTURE[:, :18], 6)
    assert_same(found[:, 22:], np.broadcast_to(MATTE, (24, 18, 3)), 2)


# --- kinds that are not read -------------------------------------------------------------------------------------


def ftyp(*brands: bytes) -> bytes:
    body = brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 8 + len(body)) + b"ftyp" + body + b"\0\0\0\x08mdat"


UNREAD = {
    "HEIC": [ftyp(b"heic", b"mif1"), ftyp(b"mif1", b"heic"), ftyp(b"heix"), ftyp(b"msf1", b"hevc")],
    "JPEG XL": [b"\xff\x0a\xfa\x1f", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20)],
    "JPEG 2000": [zoo.saved(PICTURE, "JPEG2000"), zoo.saved(PICTURE, "JPEG2000", no_jp2=True)],
    "SVG": [
        b"<svg/>",
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- an <html> drawing -->\n<svg xmlns="http://www.w3.org/2000/svg">',
        b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd"><svg:svg>',
    ],
    "PSD": [b"8BPS\0\1" + bytes(40)],
    "TGA": [zoo.saved(PICTURE, "TGA", **options) for options in ({}, {"compression": "tga_rle"})]
    + [zoo.saved(PICTURE, "TGA")[:-26], zoo.saved(Image.fromarray(PICTURE).quantize(9), "TGA")[:-26]],
    "ICO": [zoo.saved(PICTURE, "ICO")],
    "DIB": [zoo.saved(PICTURE, "DIB")],
    "OpenEXR": [b"v/1\1\2\0\0\0"],
    "PNM": [zoo.saved(PICTURE, "PPM"), b"P5 2 2 255\n...."],
}


@pytest.mark.parametrize("kind", UNREAD)
def test_pictures_of_a_kind_that_is_not_read_are_unsupported(kind: str) -> None:
    for data in UNREAD[kind]:
        assert decode(data) == Rejection(Cause.UNSUPPORTED, f"{kind} is not read")


UNKNOWN = {
    "HTML": [b"<!DOCTYPE html>", b"\n<html lang='de'>", b"<!-- <svg> --><html><svg>", b'<?xml version="1.0"?><html>'],
    "XML": [b'<?xml version="1.0"?><rss><item>&lt;svg&gt;</item></rss>'],
    "JSON": [b'{"error": "<svg>"}'],
    "PDF": [b"%PDF-1.7\n"],
    "PostScript": [b"%!PS-Adobe-3.0 EPSF-3.0"],
    "a video": [ftyp(b"isom", b"mp42"), ftyp(b"qt  "), b"\x1aE\xdf\xa3" + bytes(9)],
    "a ZIP archive": [b"PK\3\4" + bytes(30)],
    "nothing but zeros": [bytes(1000)],
    "no picture of a known kind": [b"Not found", b"RIFF\0\0\0\0WAVE", b"\0\0\2\0", bytes(20) + b"x"],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_comes_in_place_of_pictures_is_named(name: str) -> None:
    for data in UNKNOWN[name]:
        assert decode(data)[1] == name or data == b"\0\0\2\0"


@pytest.mark.parametrize(("cause", "files"), zoo.undecodable().items())
def test_the_zoo_of_what_nobody_can_decode(cause: str, files: list[bytes]) -> None:
    for data in files:
        assert cause_of(data) == cause


def test_an_avif_is_known_by_any_of_its_brands() -> None:
    data = bytearray(zoo.saved(PICTURE, "AVIF", quality=100, subsampling="4:4:4"))
    assert data[8:12] == b"avif"
    data[8:12] = b"mif1"
    assert_same(pixels_of(bytes(data)), PICTURE, CLOSE + 1)

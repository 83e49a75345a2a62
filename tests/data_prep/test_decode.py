from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_prep.images import jpeg
from data_prep.images.decode import Decoded, decode, exif_orientation, sniff
from data_prep.images.jpeg import MAX_SCANS
from data_prep.images.png import MAX_PROFILE
from data_prep.rejections import Cause, Refused, Rejection
from tests.data_prep import zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # damaged metadata is what this is about

EXACT, CLOSE = 0, 3  # levels: lossless files, JPEG at quality 100


def pixels_of(data: bytes, **options: object) -> zoo.Pixels:
    decoded = decode(data, **options)  # type: ignore[arg-type]
    assert isinstance(decoded, Decoded), decoded
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    assert decoded.pixels.flags.writeable
    return decoded.pixels


def cause_of(data: bytes, **options: object) -> Cause:
    rejection = decode(data, **options)  # type: ignore[arg-type]
    assert isinstance(rejection, Rejection), "a picture was made of it"
    return rejection.cause


def assert_same(found: zoo.Pixels, expected: object, tolerance: float = EXACT) -> None:
    wanted = np.asarray(expected)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(float) - wanted).max() <= tolerance


PICTURE = zoo.picture()
LOSSLESS: dict[str, dict[str, Any]] = {
    "png": {"kind": "PNG"},
    "webp": {"kind": "WEBP", "lossless": True},
    "bmp": {"kind": "BMP"},
    "tiff": {"kind": "TIFF", "compression": "tiff_lzw"},
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_come_through_exactly(kind: str) -> None:
    data = zoo.saved(PICTURE, **LOSSLESS[kind])
    assert_same(pixels_of(data), PICTURE)
    decoded = decode(data)
    assert isinstance(decoded, Decoded)
    assert decoded.format == kind


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_jpeg(options: dict[str, int]) -> None:
    assert_same(pixels_of(zoo.saved(PICTURE, "JPEG", quality=100, **options)), PICTURE, 8)


def test_grey_becomes_three_equal_channels() -> None:
    grey = PICTURE[:, :, 0]
    wanted = np.repeat(grey[:, :, None], 3, 2)
    assert_same(pixels_of(zoo.saved(grey, "PNG")), wanted)
    assert_same(pixels_of(zoo.saved(grey, "JPEG", quality=100)), wanted, CLOSE)
    assert_same(pixels_of(zoo.saved(Image.fromarray(grey > 100), "PNG")), np.where(wanted > 100, 255, 0))


def test_avif_and_lossy_webp() -> None:
    assert_same(pixels_of(zoo.saved(PICTURE, "AVIF", quality=100, subsampling="4:4:4")), PICTURE, 4)
    assert_same(pixels_of(zoo.saved(PICTURE, "WEBP", quality=100)), PICTURE, 12)


STORED = {  # how an upright picture lies in a file with each EXIF orientation
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.transpose(1, 0, 2),
    6: lambda up: np.rot90(up, 1),  # to be turned clockwise
    7: lambda up: up[::-1, ::-1].transpose(1, 0, 2),
    8: lambda up: np.rot90(up, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_is_put_upright(orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](PICTURE))
    tags = zoo.exif(orientation)
    assert_same(pixels_of(zoo.saved(stored, "PNG", exif=tags)), PICTURE)
    assert_same(pixels_of(zoo.saved(stored, "WEBP", lossless=True, exif=tags)), PICTURE)
    assert_same(pixels_of(zoo.saved(stored, "JPEG", quality=100, subsampling=0, exif=tags)), PICTURE, CLOSE)
    assert_same(pixels_of(zoo.saved(stored, "TIFF", exif=tags)), PICTURE)
    assert_same(pixels_of(zoo.saved(stored, "TIFF", compression="tiff_lzw", exif=tags)), PICTURE)
    assert_same(pixels_of(zoo.saved(stored, "AVIF", quality=100, subsampling="4:4:4", exif=tags)), PICTURE, 4)
    inks = Image.fromarray(stored).convert("CMYK")
    assert_same(pixels_of(zoo.saved(inks, "JPEG", quality=100, exif=zoo.exif(orientation))), PICTURE, CLOSE)


ENTRY = st.tuples(
    st.sampled_from([0x0100, 0x010F, 0x0112, 0x0131, 0x8769]), st.integers(0, 14), st.integers(0, 2), st.integers(0, 10)
)


@given(
    st.lists(ENTRY, max_size=6, unique_by=lambda entry: entry[0]),
    st.sampled_from(["<", ">"]),
    st.integers(8, 12),
    st.integers(0, 40),
    st.booleans(),
)
def test_the_orientation_is_the_one_that_pillow_reads(
    entries: list[tuple[int, int, int, int]], order: str, at: int, cut: int, prefix: bool
) -> None:
    exif = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    exif = exif.ljust(at, b"\0") + struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        count = 1 if tag == 0x0112 else count
        exif += struct.pack(order + "HHI", tag, kind, count)
        exif += struct.pack(order + ("HH" if kind in (3, 8) else "I"), *([value, 0] if kind in (3, 8) else [value]))
    exif = exif[: len(exif) - cut] if cut < 20 else exif + bytes(4)
    exif = b"Exif\0\0" + exif if prefix else exif
    theirs = Image.Exif()
    try:
        theirs.load(exif)
        found = theirs.get(0x0112, 1)
    except (SyntaxError, struct.error, OSError):
        found = 1
    known = any(tag == 0x0112 and kind in (3, 4, 8, 9) for tag, kind, _, _ in entries)
    assert exif_orientation(exif) == (found if known and isinstance(found, int) and 1 <= found <= 8 else 1)


@pytest.mark.parametrize("kind", range(14))
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_may_be_any_whole_number(kind: int, order: str) -> None:
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 1)
    value = struct.pack(order + ("HH" if kind in (3, 8) else "I"), *([6, 0] if kind in (3, 8) else [6]))
    exif = head + struct.pack(order + "HHI", 0x0112, kind, 1) + value + bytes(4)
    assert exif_orientation(exif) == (6 if kind in (3, 4, 8, 9) else 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_some_orientation(data: bytes) -> None:
    for start in (b"", b"II*\0", b"MM\0*\0\0\0\x08"):
        assert exif_orientation(start + data) in range(1, 9)


def test_only_exif_turns_a_picture() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert_same(pixels_of(zoo.saved(PICTURE, "WEBP", lossless=True, xmp=xmp)), PICTURE)
    assert_same(pixels_of(zoo.saved(PICTURE, "JPEG", quality=100, subsampling=0, xmp=xmp)), PICTURE, CLOSE)


@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_unreadable_exif_does_not_cost_the_picture(broken: bytes) -> None:
    assert_same(pixels_of(zoo.saved(PICTURE, "JPEG", quality=100, subsampling=0, exif=broken)), PICTURE, CLOSE)


def test_an_orientation_out_of_range_is_none() -> None:
    assert_same(pixels_of(zoo.saved(PICTURE, "PNG", exif=zoo.exif(9))), PICTURE)


def test_cmyk() -> None:
    inks = np.concatenate([PICTURE, PICTURE[:, :, :1] // 3], -1)
    wanted = (255.0 - inks[:, :, :3]) * (255.0 - inks[:, :, 3:]) / 255
    image = Image.fromarray(inks, "CMYK")
    assert_same(pixels_of(zoo.saved(image, "JPEG", quality=100)), wanted, CLOSE + 1)
    assert_same(pixels_of(zoo.saved(image, "TIFF")), wanted, 1)


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def test_cmyk_means_inverted_inks_with_adobes_marker_and_without() -> None:
    inks = np.concatenate([PICTURE, PICTURE[:, :, :1] // 3], -1)
    wanted = (255.0 - inks[:, :, :3]) * (255.0 - inks[:, :, 3:]) / 255
    plain = zoo.saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    assert_same(pixels_of(without_adobe(plain)), wanted, CLOSE + 1)
    ycck = simplejpeg.encode_jpeg(np.ascontiguousarray(255 - inks), 100, "CMYK", "444")
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    assert_same(pixels_of(ycck), wanted, CLOSE + 1)


def beside(data: bytes) -> tuple[int, bytes | None]:
    found = jpeg.read(data)
    return exif_orientation(found.exif), found.profile


@pytest.mark.parametrize("size", [100, 65519, 65520, 200_000])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_profile_and_orientation_in_a_jpeg_are_those_that_pillow_reads(size: int, progressive: bool) -> None:
    profile = np.random.default_rng(size).bytes(size)
    data = zoo.saved(PICTURE, "JPEG", icc_profile=profile, exif=zoo.exif(6), progressive=progressive)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile
    assert beside(data) == (6, profile)
    assert beside(data[:2] + b"\xff" * 9 + data[2:]) == (6, profile), "fill bytes may stand before a marker"
    lost = data.replace(b"ICC_PROFILE\0\x02", b"icc_profile\0\x02", 1)
    assert beside(lost)[1] == (profile if size <= 65519 else None)
    assert Image.open(io.BytesIO(lost)).info.get("icc_profile") == beside(lost)[1]


@pytest.mark.parametrize(("primaries", "gamma"), [(zoo.ADOBE, 2.2), (zoo.DISPLAY_P3, 1.8)])
def test_a_wide_gamut_profile_is_taken_to_srgb(primaries: np.ndarray, gamma: float) -> None:
    soft = (90 + PICTURE // 4).astype(np.uint8)  # inside of both gamuts
    profile = zoo.matrix_profile(primaries, gamma)
    wanted = zoo.to_srgb(soft, primaries, round(gamma * 256) / 256)
    assert np.abs(wanted - soft).max() > 10, "the profile must matter for this test to mean anything"
    assert_same(pixels_of(zoo.saved(soft, "TIFF", icc_profile=profile)), wanted, 2)
    assert_same(pixels_of(zoo.saved(soft, "AVIF", quality=100, subsampling="4:4:4", icc_profile=profile)), wanted, 6)
    assert_same(pixels_of(zoo.saved(soft, "PNG", icc_profile=profile)), wanted, 2)
    assert_same(pixels_of(zoo.saved(soft, "WEBP", lossless=True, icc_profile=profile)), wanted, 2)
    jpeg = zoo.saved(soft, "JPEG", quality=100, subsampling=0, icc_profile=profile)
    assert_same(pixels_of(jpeg), wanted, CLOSE + 2)
    clear = np.dstack([soft, np.full(soft.shape[:2], 255, np.uint8)])
    assert_same(pixels_of(zoo.saved(clear, "PNG", icc_profile=profile)), wanted, 2)
    palette = zoo.saved(Image.fromarray(soft[:1, :1].repeat(4, 0)).quantize(2), "PNG", icc_profile=profile)
    assert_same(pixels_of(palette), wanted[:1, :1].repeat(4, 0), 3)


def test_a_grey_profile_is_taken_to_srgb() -> None:
    grey = PICTURE[:, :, 0]
    linear = (grey / 255.0) ** 1.0
    tone = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    wanted = np.repeat(tone[:, :, None], 3, 2)
    profile = zoo.grey_profile(1.0)
    assert_same(pixels_of(zoo.saved(grey, "PNG", icc_profile=profile)), wanted, 2)
    assert_same(pixels_of(zoo.saved(grey, "JPEG", quality=100, icc_profile=profile)), wanted, 20)
    deep = zoo.png(40, 24, 16, 0, grey.astype(">u2") * np.uint16(257))
    iccp = zoo.chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))
    at = deep.index(b"IDAT") - 4
    assert_same(pixels_of(deep[:at] + iccp + deep[at:]), wanted, 2)


def test_a_profile_that_is_srgb_or_broken_or_of_other_colours_changes_nothing() -> None:
    for profile in (zoo.matrix_profile(zoo.SRGB, 2.2)[:200], b"not a profile", zoo.grey_profile(1.0)):
        assert_same(pixels_of(zoo.saved(PICTURE, "PNG", icc_profile=profile)), PICTURE)
    real = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_same(pixels_of(zoo.saved(PICTURE, "PNG", icc_profile=real)), PICTURE)


def test_colours_are_the_same_in_a_picture_of_many_strips() -> None:
    profile = zoo.matrix_profile(zoo.ADOBE, 2.2)
    tall = (90 + zoo.picture(700, 2000) // 4).astype(np.uint8)  # more than one strip; the last one is not full
    whole = zoo.saved(tall, "PNG", icc_profile=profile, compress_level=1)
    first = zoo.saved(tall[:50], "PNG", icc_profile=profile)
    last = zoo.saved(tall[-50:], "PNG", icc_profile=profile)
    found = pixels_of(whole)
    assert_same(found[:50], pixels_of(first))
    assert_same(found[-50:], pixels_of(last))
    jpeg = zoo.saved(tall, "JPEG", quality=100, subsampling=0, icc_profile=profile)
    assert_same(pixels_of(jpeg), found, CLOSE + 5)


def test_png_metadata_costs_neither_memory_nor_the_picture() -> None:
    whole = zoo.saved(PICTURE, "PNG")
    at = whole.index(b"IDAT") - 4
    text = zoo.chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(3_000_000)))  # Pillow alone refuses such a picture
    profile = zoo.chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(5_000_000)))
    wrong = zoo.chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    for extra in (text, profile, wrong, zoo.chunk(b"iCCP", b""), zoo.chunk(b"eXIf", b"")):
        assert_same(pixels_of(whole[:at] + extra + whole[at:]), PICTURE)
    late = zoo.exif(3).tobytes().removeprefix(b"Exif\0\0")
    end = whole.index(b"IEND") - 4
    turned = whole[:end] + zoo.chunk(b"eXIf", late) + whole[end:]
    assert_same(pixels_of(turned), PICTURE[::-1, ::-1])


def test_a_tiled_tiff() -> None:
    tiles = np.zeros((2, 3, 16, 16, 3), np.uint8)
    for row, column in itertools.product(range(2), range(3)):
        part = PICTURE[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        tiles[row, column, : part.shape[0], : part.shape[1]] = part
    assert_same(pixels_of(zoo.tiff(40, 24, 3, tiles.reshape(6, -1), tile=(16, 16))), PICTURE)
    assert_same(pixels_of(zoo.tiff(40, 24, 3, PICTURE.reshape(1, -1))), PICTURE)
    assert cause_of(zoo.tiff(40, 24, 3, tiles.reshape(6, -1), tile=(1 << 16, 16 << 10))) is Cause.CORRUPT


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_few_colours_and_one_bit(kind: str) -> None:
    few = Image.fromarray(np.arange(960, dtype=np.uint8).reshape(24, 40) % 4, "P")
    few.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200, 255, 255, 255])
    assert_same(pixels_of(zoo.saved(few, kind)), np.asarray(few.convert("RGB")))
    bits = PICTURE[:, :, 0] > 99
    assert_same(pixels_of(zoo.saved(Image.fromarray(bits), kind)), np.where(bits[:, :, None], 255, 0).repeat(3, 2))


def test_a_bmp_stored_from_the_top() -> None:
    data = bytearray(zoo.saved(np.ascontiguousarray(PICTURE[::-1]), "BMP"))
    data[22:26] = struct.pack("<i", -24)
    assert_same(pixels_of(bytes(data)), PICTURE)


def test_jpeg_of_twelve_bits_is_unsupported() -> None:
    data = bytearray(FILES["jpeg"])
    data[data.index(b"\xff\xc0") + 4] = 12
    assert cause_of(bytes(data)) in (Cause.UNSUPPORTED, Cause.CORRUPT)


def test_jpeg_of_many_scans() -> None:
    """A scan of some bytes costs a pass over all of the picture: a small file could take minutes."""
    data = zoo.saved(PICTURE, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    hidden = b"\xff\xfe\0\x06\xff\xda\xff\xd9" * 200  # comments that say what a scan and an end look like
    assert_same(pixels_of(data[:2] + hidden + data[2:]), pixels_of(data))
    for fill in (b"", hidden[:8], b"\xff\xff"):
        many = data[:-2] + (fill + data[at:-2]) * (MAX_SCANS + 1 - scans) + data[-2:]
        found = decode(many)
        assert isinstance(found, Rejection)
        assert found == (Cause.CORRUPT, f"JPEG of more than {MAX_SCANS} scans")
    assert_same(pixels_of(data + data[at:-2] * 200), pixels_of(data))  # what follows the end is not looked at


@pytest.mark.parametrize(("frame", "in_scan"), [(0xC0, 1), (0xC1, 2), (0xC2, 3)])
def test_scans_are_counted_wherever_a_picture_may_have_many(frame: int, in_scan: int) -> None:
    head = b"\xff\xd8\xff" + bytes([frame]) + b"\0\x11\x08\0\x08\0\x08\x03" + bytes(9)
    scan = b"\xff\xda\0\x04" + bytes([in_scan, 0]) + b"\x11\xff\0\xff\xd0"
    for count, cause in ((MAX_SCANS, Cause.TRUNCATED), (MAX_SCANS + 1, Cause.CORRUPT)):
        with pytest.raises(Refused) as found:
            jpeg.read(head + scan * count + b"\xff\xd9")
        assert found.value.rejection.cause is cause, "they hold nothing, but are not too many"
    jpeg.read(head.replace(bytes([0xFF, frame]), b"\xff\xc0") + scan.replace(bytes([in_scan, 0]), b"\3\0") * 200)


def test_a_profile_of_many_megabytes_is_not_used() -> None:
    profile = zoo.matrix_profile(zoo.ADOBE, 2.2)
    assert np.abs(pixels_of(zoo.saved(PICTURE, "WEBP", lossless=True, icc_profile=profile)) - PICTURE.astype(int)).max()
    for kind in ("WEBP", "PNG"):
        assert_same(
            pixels_of(zoo.saved(PICTURE, kind, lossless=True, icc_profile=profile + bytes(MAX_PROFILE))), PICTURE
        )


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.array([[0, 32896, 65535, 257, 128]], ">u2")
    wanted = np.array([[[0] * 3, [128] * 3, [255] * 3, [1] * 3, [0] * 3]])
    assert_same(pixels_of(zoo.png(5, 1, 16, 0, grey)), wanted)
    tiff = zoo.saved(Image.fromarray(grey.astype(np.uint16)), "TIFF")
    assert_same(pixels_of(tiff), wanted)
    deep = PICTURE.astype(">u2") * np.uint16(257)
    assert_same(pixels_of(zoo.png(40, 24, 16, 2, deep)), PICTURE)
    alpha = np.full((24, 40, 1), 65535, ">u2")
    assert_same(pixels_of(zoo.png(40, 24, 16, 6, np.concatenate([deep, alpha], -1))), PICTURE)
    half = np.concatenate([deep, alpha // 2], -1).astype(">u2")
    assert_same(pixels_of(zoo.png(40, 24, 16, 6, half)), (PICTURE + 255.0) / 2, 1)
    grey_alpha = np.concatenate([deep[:, :, :1], alpha // 2], -1).astype(">u2")
    assert_same(pixels_of(zoo.png(40, 24, 16, 4, grey_alpha)), (PICTURE[:, :, :1].repeat(3, 2) + 255.0) / 2, 1)


def test_values_without_a_range_are_unsupported() -> None:
    assert cause_of(zoo.saved(Image.new("F", (8, 8)), "TIFF")) is Cause.UNSUPPORTED
    assert cause_of(zoo.saved(Image.new("I", (8, 8)), "TIFF")) is Cause.UNSUPPORTED


def test_transparency_is_laid_on_the_matte() -> None:
    alpha = np.linspace(0, 255, 24 * 40).reshape(24, 40, 1).round().astype(np.uint8)
    rgba = np.concatenate([PICTURE, alpha], -1)
    for matte in ((255, 255, 255), (10, 200, 30)):
        wanted = (PICTURE * (alpha / 255.0)) + np.array(matte) * (1 - alpha / 255.0)
        for data in (
            zoo.saved(rgba, "PNG"),
            zoo.saved(rgba, "WEBP", lossless=True, exact=True),
            zoo.saved(rgba, "TIFF"),
        ):
            assert_same(pixels_of(data, matte=matte), wanted, 1)
    grey = np.concatenate([PICTURE[:, :, :1], alpha], -1)
    wanted = PICTURE[:, :, :1].repeat(3, 2) * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    assert_same(pixels_of(zoo.saved(Image.fromarray(grey, "LA"), "PNG")), wanted, 1)


def test_palette_with_alpha_and_keyed_colours() -> None:
    index = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    palette = zoo.chunk(b"PLTE", bytes([0, 0, 0, 200, 0, 0, 0, 0, 200])) + zoo.chunk(b"tRNS", bytes([0, 128, 255]))
    colours = np.array([[255, 255, 255], [227, 127, 127], [0, 0, 200]])
    assert_same(pixels_of(zoo.png(4, 3, 8, 3, index, palette)), colours[index], 1)
    keyed = zoo.chunk(b"tRNS", struct.pack(">HHH", *map(int, PICTURE[0, 0])))
    found = pixels_of(zoo.png(40, 24, 8, 2, PICTURE, keyed), matte=(1, 2, 3))
    assert_same(found[0, 0], [1, 2, 3])
    assert_same(found[1:], PICTURE[1:])
    gif = Image.fromarray(index, "P")
    gif.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    shown = np.array([[255, 255, 255], [200, 0, 0], [0, 0, 200]])
    assert_same(pixels_of(zoo.saved(gif, "GIF", transparency=0)), shown[index])


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("AVIF", {})]
)
def test_animations_give_their_first_frame(kind: str, options: dict[str, bool]) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *rest = (Image.new("RGB", (20, 10), colour) for colour in colours)
    found = pixels_of(zoo.saved(first, kind, save_all=True, append_images=rest, **options))
    assert_same(found, np.broadcast_to(colours[0], (10, 20, 3)), 6 if kind == "AVIF" else EXACT)


def test_the_pixel_limit_is_exact() -> None:
    data = zoo.saved(PICTURE, "PNG")
    assert_same(pixels_of(data, max_pixels=24 * 40), PICTURE)
    assert cause_of(data, max_pixels=24 * 40 - 1) is Cause.TOO_MANY_PIXELS


FILES = {
    "jpeg": zoo.saved(PICTURE, "JPEG", exif=zoo.exif(6)),
    "progressive": zoo.saved(PICTURE, "JPEG", progressive=True),
    "cmyk": zoo.saved(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "icc": zoo.saved(PICTURE, "JPEG", icc_profile=zoo.matrix_profile(zoo.ADOBE, 2.2)),
    "png": zoo.saved(PICTURE, "PNG"),
    "palette": zoo.saved(Image.fromarray(PICTURE).quantize(16), "PNG"),
    "gif": zoo.saved(PICTURE, "GIF"),
    "webp": zoo.saved(PICTURE, "WEBP"),
    "lossless": zoo.saved(PICTURE, "WEBP", lossless=True, exif=zoo.exif(3)),
    "bmp": zoo.saved(PICTURE, "BMP"),
    "tiff": zoo.saved(PICTURE, "TIFF", compression="tiff_lzw"),
    "avif": zoo.saved(PICTURE, "AVIF"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(name: str, share: float) -> None:
    data = FILES[name]
    assert cause_of(data[: int(len(data) * share)]) in (Cause.TRUNCATED, Cause.CORRUPT)


def test_a_png_with_one_wrong_bit_in_its_pixels_is_refused() -> None:
    data = bytearray(FILES["png"])
    data[data.index(b"IDAT") + 40] ^= 1
    assert cause_of(bytes(data)) is Cause.CORRUPT
    assert cause_of(FILES["png"][:-12]) is Cause.TRUNCATED


def test_what_is_no_image_is_refused_by_its_bytes() -> None:
    assert cause_of(b"") is Cause.EMPTY
    for data in (b"<!DOCTYPE html>", b"%!PS-Adobe-3.0 EPSF", b"\0" * 100, b"%PDF-1.4", b"\xff\xd8"):
        assert cause_of(data) is Cause.UNKNOWN_FORMAT
    assert sniff(FILES["jpeg"]) == "JPEG"

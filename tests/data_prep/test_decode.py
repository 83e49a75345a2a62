from __future__ import annotations

import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.decode import Decoded, decode, sniff
from data_prep.rejections import Cause, Rejection
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
LOSSLESS = {
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
    inks = Image.fromarray(stored).convert("CMYK")
    assert_same(pixels_of(zoo.saved(inks, "JPEG", quality=100, exif=tags)), PICTURE, CLOSE)


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


def test_a_wide_gamut_profile_is_taken_to_srgb() -> None:
    soft = (90 + PICTURE // 4).astype(np.uint8)  # inside of both gamuts
    profile = zoo.matrix_profile(zoo.ADOBE, 2.2)
    wanted = zoo.to_srgb(soft, zoo.ADOBE, 563 / 256)
    assert np.abs(wanted - soft).max() > 10, "the profile must matter for this test to mean anything"
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
    from PIL import ImageCms

    real = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_same(pixels_of(zoo.saved(PICTURE, "PNG", icc_profile=real)), PICTURE)


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


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_animations_give_their_first_frame(kind: str, options: dict[str, bool]) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *rest = (Image.new("RGB", (20, 10), colour) for colour in colours)
    found = pixels_of(zoo.saved(first, kind, save_all=True, append_images=rest, **options))
    assert_same(found, np.broadcast_to(colours[0], (10, 20, 3)))


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    at = next(data.index(bytes([0xFF, marker])) for marker in (0xC0, 0xC2) if bytes([0xFF, marker]) in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def bombs() -> dict[str, bytes]:
    webp = bytearray(zoo.saved(np.dstack([PICTURE, PICTURE[:, :, :1]]), "WEBP"))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\0" * 2
    gif = bytearray(zoo.saved(PICTURE, "GIF"))
    gif[6:10] = b"\xff\xff" * 2
    bmp = bytearray(zoo.saved(PICTURE, "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    tiff = bytearray(zoo.saved(PICTURE, "TIFF"))
    for tag in (256, 257):  # width and height: one 32-bit value each
        at = tiff.index(struct.pack("<HHI", tag, 4, 1))
        tiff[at + 8 : at + 12] = struct.pack("<I", 60_000)
    return {
        "png": zoo.png(30_000, 30_000, 8, 2, bytes(4096)),
        "jpeg": with_jpeg_size(zoo.saved(PICTURE, "JPEG"), 65_500, 65_500),
        "webp": bytes(webp),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "tiff": bytes(tiff),
    }


def test_bombs_are_refused_from_the_header_before_any_memory_is_taken() -> None:
    files = bombs()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, data in files.items():
        assert len(data) < 300_000, kind
        assert cause_of(data) is Cause.TOO_MANY_PIXELS, kind
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


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
    for data in (b"<!DOCTYPE html>", b"%!PS-Adobe-3.0 EPSF", b"<svg/>", b"\0" * 100, b"%PDF-1.4", b"\xff\xd8"):
        assert cause_of(data) is Cause.UNKNOWN_FORMAT
    assert sniff(FILES["jpeg"]) == "JPEG"


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for at, bits in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(1, 255)), max_size=12)):
        data[at] ^= bits
    cut = draw(st.integers(0, len(data)))
    if draw(st.booleans()):
        del data[cut : cut + draw(st.integers(0, 400))]
    if draw(st.booleans()):
        data[cut:cut] = draw(st.binary(max_size=200))
    return bytes(data)


@st.composite
def nonsense(draw: st.DrawFn) -> bytes:
    start = FILES[draw(st.sampled_from(sorted(FILES)))][: draw(st.integers(0, 64))]
    return start + draw(st.binary(max_size=300))


@settings(max_examples=600)
@given(damaged() | nonsense())
def test_any_bytes_give_a_picture_or_a_typed_rejection(data: bytes) -> None:
    decoded = decode(data, max_pixels=1_000_000)
    if isinstance(decoded, Rejection):
        assert isinstance(decoded.cause, Cause)
    else:
        height, width, channels = decoded.pixels.shape
        assert channels == 3
        assert 0 < height * width <= 1_000_000
        assert decoded.pixels.dtype == np.uint8

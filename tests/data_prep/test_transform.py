from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.rejections import Cause, Rejection
from data_prep.transform import Box, centre_square, encode_jpeg, resized, square
from tests.data_prep import zoo


def float_lanczos(pixels: zoo.Pixels, box: Box, size: int) -> np.ndarray:
    """Pillow's Lanczos in floating point, channel by channel: nothing is rounded on the way."""
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float32)
    channels = [Image.fromarray(part[:, :, i]).resize((size, size), Image.Resampling.LANCZOS) for i in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], -1)


def psnr(found: zoo.Pixels, wanted: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((found - wanted.clip(0, 255)) ** 2)))


@pytest.mark.parametrize(("height", "width", "size"), [(480, 640, 256), (517, 389, 64), (300, 300, 299), (90, 700, 32)])
def test_the_resize_is_an_antialiased_lanczos(height: int, width: int, size: int) -> None:
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)  # the hardest content there is
    picture = (0.7 * zoo.picture(height, width) + 0.3 * noise).astype(np.uint8)
    made = square(picture, size)
    assert not isinstance(made, Rejection)
    found, box = made
    assert found.shape == (size, size, 3)
    assert found.flags.c_contiguous
    assert psnr(found, float_lanczos(picture, box, size)) > 50


def test_the_crop_is_the_centre_square() -> None:
    assert centre_square(100, 60) == Box(20, 0, 60, 60)
    assert centre_square(61, 100) == Box(0, 19, 61, 61)
    picture = zoo.picture(24, 40)
    made = square(picture, 24)
    assert not isinstance(made, Rejection)
    np.testing.assert_array_equal(made[0], picture[:, 8:32])


@given(st.integers(1, 400), st.integers(1, 400))
def test_the_crop_lies_inside_and_is_as_large_as_can_be(width: int, height: int) -> None:
    box = centre_square(width, height)
    assert box.width == box.height == min(width, height)
    assert 0 <= box.left <= width - box.width
    assert 0 <= box.top <= height - box.height
    assert abs((width - box.width) - 2 * box.left) <= 1
    assert abs((height - box.height) - 2 * box.top) <= 1


@settings(max_examples=20)
@given(st.integers(8, 60), st.integers(8, 60))
def test_pictures_are_never_enlarged(width: int, height: int) -> None:
    made = square(zoo.picture(height, width), 32)
    if min(width, height) < 32:
        assert isinstance(made, Rejection)
        assert made.cause is Cause.TOO_SMALL
    else:
        assert not isinstance(made, Rejection)


def test_the_same_pixels_whatever_lies_around_the_crop() -> None:
    inner = zoo.picture(60, 60)
    wide = np.pad(inner, ((0, 0), (21, 13), (0, 0)), constant_values=99)
    alone = resized(inner, Box(0, 0, 60, 60), 24, 24)
    np.testing.assert_array_equal(resized(wide, Box(21, 0, 60, 60), 24, 24), alone)


@pytest.mark.parametrize(("subsampling", "layout"), [("444", (1, 1)), ("422", (2, 1)), ("420", (2, 2))])
def test_jpeg_quality_and_subsampling(subsampling: str, layout: tuple[int, int]) -> None:
    picture = zoo.picture(64, 64)
    low, high = encode_jpeg(picture, 50, subsampling), encode_jpeg(picture, 100, subsampling)
    assert len(low) < len(high)
    assert simplejpeg.decode_jpeg_header(high)[3] == subsampling
    image = Image.open(io.BytesIO(high))
    assert image.layer[0][1:3] == layout  # type: ignore[attr-defined]
    assert np.abs(np.asarray(image).astype(int) - picture).max() <= (3 if subsampling == "444" else 12)

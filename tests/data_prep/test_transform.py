from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images.sizes import SUFFIX, Bucket, Buckets, Format, Size, size_name
from data_prep.images.transform import Box, centre_box, encode, fitted, resized
from data_prep.prepare.plan import PrepareSettings
from data_prep.rejections import Cause, Rejection
from infra.config import digest, parse
from infra.errors import SettingsError
from tests.data_prep import zoo

SQUARE = Bucket(1, 1)
BUCKETS_512 = Buckets(name="b512", side=512)


@st.composite
def bucket_sets(draw: st.DrawFn) -> Buckets:
    step = 16 * draw(st.integers(1, 5))
    side, aspect = draw(st.integers(step, 700)), draw(st.floats(1, 4))
    return Buckets(name="any", side=side, step=step, max_aspect=aspect)


def test_the_buckets_of_half_a_thousand() -> None:
    assert BUCKETS_512.buckets == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


@given(bucket_sets())
def test_buckets_are_all_the_shapes_of_the_budget_that_lie_in_no_other(found: Buckets) -> None:
    sides = range(found.step, found.side**2 // found.step + 1, found.step)
    possible = [
        (w, h)
        for w in sides
        for h in range(found.step, found.side**2 // w + 1, found.step)
        if w <= h * found.max_aspect and h <= w * found.max_aspect
    ]
    largest = {a for a in possible if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in possible)}
    assert set(found.buckets) == largest
    assert len(found.buckets) == len(largest) > 0
    assert {(h, w) for w, h in found.buckets} == largest, "as many tall ones as wide ones"


@given(bucket_sets(), st.integers(1, 1500), st.integers(1, 1500))
def test_the_bucket_that_keeps_most_is_chosen(found: Buckets, width: int, height: int) -> None:
    def kept(shape: Bucket) -> float:
        box = min(width / shape.width, height / shape.height)
        return box * shape.width * box * shape.height / (width * height)

    fitting = [b for b in found.buckets if b.width <= width and b.height <= height]
    chosen = found.choose(width, height)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert chosen in fitting
        assert kept(chosen) > max(kept(b) for b in fitting) - 1e-9


def test_a_tie_is_decided_the_same_way_every_time() -> None:
    assert BUCKETS_512.choose(4000, 4000) == (512, 512)
    between = Buckets(
        name="two", side=512, step=256
    )  # 256 x 512 pixels would be below the budget, and lies in 512 x 512
    assert between.buckets == ((512, 512),)
    tie = Buckets(name="tie", side=96, step=64)  # 64 x 128 and 128 x 64
    assert tie.buckets == ((64, 128), (128, 64))
    assert tie.choose(500, 500) == (128, 64)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": 24},
        {"step": 0},
        {"side": 32},
        {"max_aspect": 0.5},
        {"max_aspect": float("nan")},
        {"name": "../x"},
        {"name": "512"},
        {"unknown": 1},
    ],
)
def test_bucket_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        parse(Buckets, {"name": "b", "side": 512, **wrong})


def test_sizes_have_names_and_buckets_count_towards_the_digest() -> None:
    assert size_name(256) == "256"
    assert size_name(BUCKETS_512) == "b512"
    other = Buckets(name="b512", side=512, max_aspect=1.5)
    assert digest(BUCKETS_512) != digest(other)
    assert BUCKETS_512.buckets  # what is worked out from the settings is no part of them
    assert digest(BUCKETS_512) == digest(Buckets(name="b512", side=512))


def test_the_crop_is_the_middle() -> None:
    assert centre_box(100, 60, SQUARE) == Box(20, 0, 60, 60)
    assert centre_box(61, 100, SQUARE) == Box(0, 19, 61, 61)
    assert centre_box(1000, 600, Bucket(576, 448)) == Box(114, 0, 771, 600)
    picture = zoo.picture(24, 40)
    made = fitted(picture, 24)
    assert not isinstance(made, Rejection)
    np.testing.assert_array_equal(made[0], picture[:, 8:32])


@given(st.integers(16, 900), st.integers(16, 900), st.integers(1, 400), st.integers(1, 400))
def test_the_crop_has_the_aspect_and_is_as_large_as_can_be(width: int, height: int, w: int, h: int) -> None:
    if w > width or h > height:
        return
    box = centre_box(width, height, Bucket(w, h))
    assert box.width == width or box.height == height
    assert w <= box.width <= width
    assert h <= box.height <= height
    assert abs(box.width - box.height * w / h) <= max(0.5, 0.5 * w / h)
    assert abs((width - box.width) - 2 * box.left) <= 1
    assert abs((height - box.height) - 2 * box.top) <= 1
    assert box.left >= 0
    assert box.top >= 0


@settings(max_examples=60)
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([32, Buckets(name="small", side=48, step=16)]))
def test_pictures_are_never_enlarged(width: int, height: int, size: Size) -> None:
    made = fitted(zoo.picture(height, width), size)
    shapes = size.buckets if isinstance(size, Buckets) else (Bucket(size, size),)
    if not any(w <= width and h <= height for w, h in shapes):
        assert isinstance(made, Rejection)
        assert made.cause is Cause.TOO_SMALL
        assert f"{width} x {height}" in made.detail
    else:
        assert not isinstance(made, Rejection)
        pixels, box = made
        assert pixels.shape[1::-1] in shapes
        assert box.width >= pixels.shape[1]
        assert box.height >= pixels.shape[0]
        assert pixels.flags.c_contiguous


def test_the_same_pixels_whatever_lies_around_the_crop() -> None:
    inner = zoo.picture(60, 60)
    wide = np.pad(inner, ((0, 0), (21, 13), (0, 0)), constant_values=99)
    alone = resized(inner, Box(0, 0, 60, 60), Bucket(24, 24))
    np.testing.assert_array_equal(resized(wide, Box(21, 0, 60, 60), Bucket(24, 24)), alone)


@pytest.mark.parametrize(("subsampling", "layout"), [("444", (1, 1)), ("422", (2, 1)), ("420", (2, 2))])
def test_jpeg_quality_and_subsampling(subsampling: str, layout: tuple[int, int]) -> None:
    picture = zoo.picture(64, 64)
    low, high = (encode(picture, "jpeg", quality, subsampling) for quality in (50, 100))  # type: ignore[arg-type]
    assert len(low) < len(high)
    assert simplejpeg.decode_jpeg_header(high)[3] == subsampling
    image = Image.open(io.BytesIO(high))
    assert image.layer[0][1:3] == layout  # type: ignore[attr-defined]
    assert np.abs(np.asarray(image).astype(int) - picture).max() <= (3 if subsampling == "444" else 12)


@pytest.mark.parametrize("form", SUFFIX)
def test_every_format_is_what_it_says_and_the_same_every_time(form: Format) -> None:
    picture = zoo.photograph(1, 96, 128)
    data = encode(picture, form, 90)
    assert data == encode(picture.copy(), form, 90)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == form.upper()
        shown = np.asarray(image.convert("RGB"))
    error = np.abs(shown.astype(int) - picture).mean()
    assert error == 0 if form == "png" else error < 12  # colours at half the resolution
    if form != "png":
        assert len(encode(picture, form, 30)) < len(data)


def test_adms_way_halves_by_box_then_resizes_bicubically_and_cuts_the_centre() -> None:
    """Each step is written down here as numbers, one axis after the other: means of two, then Keys' cubic filter."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 100, 3), np.uint8)
    made = fitted(picture, 24, "adm")
    assert not isinstance(made, Rejection)
    half = bytes_of(bytes_of(picture.reshape(64, 50, 2, 3).mean(2)).reshape(32, 2, 50, 3).mean(1))  # below twice 24
    resized = cubic(cubic(half, round(50 * 24 / 32), 1), 24, 0)
    left = (38 - 24) // 2
    assert np.abs(made[0] - resized[:, left : left + 24]).max() <= 1
    assert made[1] == Box(18, 0, 64, 64)


def bytes_of(pixels: np.ndarray) -> np.ndarray:
    return np.floor(pixels + 0.5).clip(0, 255)


def cubic(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resize one axis with Keys' filter (a = -1/2), stretched by the scale where it makes smaller."""
    before = pixels.shape[axis]
    scale = before / size
    x = np.abs(np.arange(before)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / max(1.0, scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    return bytes_of(np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis))


def test_adms_way_enlarges_what_is_small_and_makes_no_buckets() -> None:
    made = fitted(zoo.picture(20, 30), 32, "adm")
    assert not isinstance(made, Rejection) and made[0].shape == (32, 32, 3)
    source = {"kind": "text_folder", "name": "own", "url": "photos"}
    with pytest.raises(SettingsError, match="adm makes squares"):
        parse(PrepareSettings, {"sources": [source], "sizes": [{"name": "b", "side": 64}], "resize": "adm"})

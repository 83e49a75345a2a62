from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images.phash import _grid, phash

Pixels_HW3 = npt.NDArray[np.uint8]


@lru_cache(maxsize=64)
def scene(seed: int, height: int = 256, width: int = 256) -> Pixels_HW3:
    """Like a photograph to a hash: structure at every scale, less of it the finer."""
    rng = np.random.default_rng(seed)
    v, u = np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512), indexing="ij")
    size = np.maximum(np.hypot(v, u), 1 / 512)
    spectrum = np.fft.fft2(rng.normal(size=(3, 512, 512)) + 2 * rng.normal(size=(512, 512))) / size**1.2
    wave = np.fft.ifft2(spectrum).real[:, : 2 * height, : 2 * width]
    wave = (wave - wave.mean()) / wave.std()
    picture = np.clip(120 + 45 * wave, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return resized(picture, height, width) if picture.shape[:2] != (height, width) else picture


def resized(pixels: Pixels_HW3, height: int, width: int) -> Pixels_HW3:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def stored(pixels: Pixels_HW3, quality: int) -> Pixels_HW3:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def bits(pixels: Pixels_HW3) -> int:
    found = phash(pixels)
    assert found is not None
    return found


def plainly(pixels: Pixels_HW3) -> tuple[list[bool], npt.NDArray[np.float64]]:
    """The docstring word by word in floats: the bits, and how far each coefficient is from the median."""
    luma = pixels @ np.array([77, 150, 29]) / 256
    height, width = luma.shape
    fine = np.repeat(np.repeat(luma, 32, axis=0), 32, axis=1)
    grid = fine.reshape(32, height, 32, width).mean(axis=(1, 3))
    x = np.arange(32)
    waves = np.array([np.cos(np.pi * (2 * x + 1) * u / 64) * np.sqrt((2 if u else 1) / 32) for u in range(32)])
    coefficients = waves @ grid @ waves.T
    order = [(u, total - u) for total in range(1, 11) for u in range(total + 1)][:64]
    chosen = np.array([coefficients[at] for at in order])
    away = chosen - np.median(chosen)
    return (away > 0).tolist(), np.abs(away)


@pytest.mark.parametrize("size", [(256, 256), (64, 96), (208, 304), (257, 333), (40, 31), (512, 384)])
def test_it_is_what_its_docstring_says(size: tuple[int, int]) -> None:
    picture = scene(3, *size)
    expected, away = plainly(picture)
    found = [digit == "1" for digit in f"{bits(picture):064b}"]
    sure = away > 0.1  # beyond the rounding of the grid
    assert sure.sum() >= 60
    assert np.array_equal(np.array(found)[sure], np.array(expected)[sure])
    assert sum(found) == 32


KNOWN = ["0f6429be40dfc9c6", "0c3ac84d762bbe2d"]


def test_known_hashes() -> None:
    """The same on every machine, from version to version: indexes of years must agree."""
    y, x, c = np.meshgrid(np.arange(96), np.arange(160), np.arange(3), indexing="ij")
    rings = ((x - 50) ** 2 + (y - 30) ** 2 + 40 * c * x) // 37 % 256
    tiles = (x // 13 * 53 + y // 11 * 91 + x // 13 * (y // 11) * 29 + c * 17) % 256
    found = [phash(picture.astype(np.uint8)) for picture in (rings, tiles)]
    assert [f"{value:016x}" for value in found if value is not None] == KNOWN


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_picture_stored_again_stays_close(quality: int) -> None:
    distances = [(bits(scene(seed)) ^ bits(stored(scene(seed), quality))).bit_count() for seed in range(12)]
    assert max(distances) <= 4


def test_a_picture_resized_or_brightened_stays_close() -> None:
    for seed in range(8):
        large = scene(seed, 512, 512) if seed % 2 else scene(seed, 320, 480)
        height, width = large.shape[:2]
        brighter = np.clip(large.astype(int) + 6, 0, 255).astype(np.uint8)
        for changed in (resized(large, height // 2, width // 2), resized(large, 200, 200), brighter):
            assert (bits(large) ^ bits(changed)).bit_count() <= 4


def test_unrelated_pictures_are_far_apart() -> None:
    found = [bits(scene(seed)) for seed in range(24)]
    distances = [(one ^ other).bit_count() for n, one in enumerate(found) for other in found[:n]]
    assert min(distances) >= 12
    assert 30 < np.mean(distances) < 34
    used = np.array([[value >> place & 1 for place in range(64)] for value in found]).mean(axis=0)
    assert used.min() > 0.1 and used.max() < 0.9  # every bit says something


FLAT: list[Any] = [
    np.full((256, 256, 3), 255, np.uint8),
    np.full((1, 1, 3), 7, np.uint8),
    np.full((33, 65, 3), 128, np.uint8),
    np.full((256, 256, 3), (250, 10, 90), np.uint8),
    np.random.default_rng(0).integers(127, 130, (256, 256, 3), dtype=np.uint8),  # noise
    np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3)),  # one direction alone
    np.kron([[0, 1], [1, 0]], np.ones((128, 128)))[..., None].repeat(3, 2).astype(np.uint8) * 255,  # symmetries
]


@pytest.mark.parametrize("picture", FLAT)
def test_a_picture_with_nothing_in_it_has_no_hash(picture: Pixels_HW3) -> None:
    assert phash(picture) is None


def test_a_little_noise_on_something_flat_is_still_nothing() -> None:
    noisy = np.random.default_rng(0).normal(200, 3, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    assert phash(noisy) is None
    assert phash(stored(noisy, 60)) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32))
def test_any_size_and_its_cells_are_exact_areas(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    luma = picture.astype(np.int64) @ [77, 150, 29]
    fine = luma.repeat(32, 0).repeat(32, 1).reshape(32, height, 32, width).sum(axis=(1, 3))
    assert np.array_equal(_grid(picture), fine * 64 // (256 * height * width))
    found = phash(picture)
    assert found is None or found.bit_count() <= 32
    assert found == phash(np.asfortranarray(picture)) == phash(np.ascontiguousarray(picture[::-1])[::-1])

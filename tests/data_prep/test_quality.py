"""At least 50 dB against the Lanczos of the textbook, before encoding.

The pictures here are made; `python -m tests.data_prep.test_quality FOLDER` measures photographs of one's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.images.decode import Decoded, decode
from data_prep.images.sizes import Buckets, Size, size_name
from data_prep.images.transform import Box, fitted
from data_prep.rejections import Rejection
from tests.data_prep import zoo

FLOOR = 50.0  # dB
SIZES: list[Size] = [256, 512, Buckets(name="buckets", side=512), Buckets(name="fine", side=256, step=16)]


def float_lanczos(pixels: zoo.Pixels, box: Box, width: int, height: int) -> npt.NDArray[np.float64]:
    """Every pixel weighted by the three-lobed window, stretched to the scale: double precision, nothing rounded."""
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float64)
    rows = np.tensordot(_weights(box.height, height), part, (1, 0))
    return np.asarray(np.einsum("xw,ywc->yxc", _weights(box.width, width), rows, optimize=True))


def _weights(before: int, after: int) -> npt.NDArray[np.float64]:
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale
    away = (np.arange(before) + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def psnr(found: zoo.Pixels, wanted: npt.NDArray[Any]) -> float:
    error = np.mean((found - wanted.clip(0, 255)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-6)))  # a flat picture comes through exactly


def measured(pixels: zoo.Pixels, size: Size) -> float | None:
    """None where the picture is too small for the size."""
    made = fitted(pixels, size)
    if isinstance(made, Rejection):
        return None
    found, box = made
    height, width, _ = found.shape
    if (height, width) == (box.height, box.width):
        return None  # nothing was resized
    return psnr(found, float_lanczos(pixels, box, width, height))


@pytest.mark.parametrize(("height", "width"), [(768, 1024), (750, 500), (1067, 1600), (613, 517)])
def test_photographs_come_out_at_fifty_decibels_and_more(height: int, width: int) -> None:
    picture = zoo.photograph(height, height, width)
    found = {size_name(size): measured(picture, size) for size in SIZES}
    assert found["256"] is not None
    assert all(value is None or value > FLOOR for value in found.values()), found


@pytest.mark.parametrize(("height", "width", "size"), [(480, 640, 256), (517, 389, 64), (300, 300, 299), (90, 700, 32)])
def test_noise_the_hardest_content_there_is(height: int, width: int, size: int) -> None:
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    quality = measured((0.7 * zoo.picture(height, width) + 0.3 * noise).astype(np.uint8), size)
    assert quality is not None
    assert quality > FLOOR


@pytest.mark.parametrize("scale", [1.4, 3.0])
def test_black_on_white_is_as_good_as_pillow_makes_it(scale: float) -> None:
    """Full black beside full white overshoots in the first pass, and eight bits cut it off there: 46 dB, in both."""
    height = width = int(256 * scale)
    light = zoo.photograph(5, height, width)
    drawing = np.where(light[:, :, :1] > 128, 255, 0).astype(np.uint8).repeat(3, 2)
    wanted = float_lanczos(drawing, Box(0, 0, width, height), 256, 256)
    pillow = np.asarray(Image.fromarray(drawing).resize((256, 256), Image.Resampling.LANCZOS))
    ours = measured(drawing, 256)
    assert ours is not None
    assert ours > psnr(pillow, wanted) - 0.2


def test_the_measure_agrees_with_pillow_in_floating_point() -> None:
    picture = zoo.photograph(3, 200, 300)
    wanted = float_lanczos(picture, Box(0, 0, 300, 200), 90, 70)
    for channel in range(3):
        image = Image.fromarray(picture[:, :, channel].astype(np.float32))
        shown = np.asarray(image.resize((90, 70), Image.Resampling.LANCZOS))
        np.testing.assert_allclose(shown, wanted[:, :, channel], atol=1e-3)


def test_the_measure_sees_a_poorer_resize() -> None:
    picture = zoo.photograph(3, 400, 600)
    wanted = float_lanczos(picture, Box(100, 0, 400, 400), 128, 128)
    cut = Image.fromarray(picture).crop((100, 0, 500, 400))
    for way in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX):
        assert psnr(np.asarray(cut.resize((128, 128), way)), wanted) < 45


def main(folder: Path) -> None:
    found: dict[str, list[float]] = {size_name(size): [] for size in SIZES}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        decoded = decode(file.read_bytes())
        if isinstance(decoded, Decoded):
            for size in SIZES:
                if (value := measured(decoded.pixels, size)) is not None:
                    found[size_name(size)].append(value)
    for name, values in found.items():
        if values:
            print(
                f"{name:10s} {len(values):6d} pictures  min {min(values):5.1f} dB  median {np.median(values):5.1f} dB"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

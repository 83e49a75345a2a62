"""Judges say what is in a picture; the protocol in `geneval` depends on nothing but their answers.

`ShapeJudge` is the judge of the shape world: geometry in closed form, no network. In names of arrays H, W are a
picture's rows and columns, C its channels, K the palette's colours, S the shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.shapes.world import COLOURS, SHAPES, Thing, coverage

Image = npt.NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Detection:
    """`box` is (left, top, right, bottom) in pixels, right and bottom exclusive; `mask_HW` has the picture's size."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_HW: Mask


NO_MASK: Mask = np.zeros((0, 0), np.bool_)  # of a detection whose mask nobody asks for


class Judge(Protocol):
    @property
    def name(self) -> str: ...

    def detect(self, image_HWC: Image) -> Sequence[Detection]: ...

    def colour(self, image_HWC: Image, detection: Detection) -> str: ...


class BatchJudge(ABC):
    """A judge that looks at several pictures at once."""

    name: str
    batch: int  # pictures at once

    @abstractmethod
    def detections(self, images: Sequence[Image]) -> list[list[Detection]]: ...

    @abstractmethod
    def colours(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        """The colour of each object in the picture that it was found in."""

    def detect(self, image_HWC: Image) -> Sequence[Detection]:
        return self.detections([image_HWC])[0]

    def colour(self, image_HWC: Image, detection: Detection) -> str:
        return self.colours([(image_HWC, detection)])[0]


class OneByOne(BatchJudge):
    """A judge of single pictures as one of batches."""

    batch = 1

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, judge.name

    def detections(self, images: Sequence[Image]) -> list[list[Detection]]:
        return [list(self.judge.detect(image)) for image in images]

    def colours(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        return [self.judge.colour(image, detection) for image, detection in objects]


# A region is compared with the ideal shapes of its own area and centroid. Scores are a softmax over the overlaps (IoU)
# and a constant for "none of these": a blob is no shape, and a region between two shapes has a low score for both.
SHARPNESS = 40.0  # of the softmax
NO_SHAPE = 0.72  # overlap that stands for "none of these"
SMALLEST = 0.02  # share of the picture's area; the smallest thing that the shape world draws has nearly twice that
# Shares of the way from the background to a palette colour:
FOREGROUND = 0.4  # a pixel beyond it belongs to a thing; less than half, as a small model draws pale things
PALEST = 0.7  # a thing's colour is looked for from here on: paler than that, red is nearer to pink


@dataclass(frozen=True)
class ShapeJudge:
    """Finds circles, squares and triangles on a plain background, also soft, noisy and off in colour."""

    name: str = "shapes"

    def detect(self, image_HWC: Image) -> list[Detection]:
        assert image_HWC.shape[0] == image_HWC.shape[1], "the shape world is square"
        label_HW, strength_HW = _segment(image_HWC)
        smallest = SMALLEST * label_HW.size
        plain = _plainness(strength_HW)
        detections: list[Detection] = []
        for region in _components(np.where(strength_HW > FOREGROUND, 0, -1), smallest):
            whole = _classify(region, strength_HW, plain)
            # One region of several colours may be several things that touch.
            colours = np.where(region, label_HW, -1)
            parts = [_classify(part, np.where(part, strength_HW, 0), plain) for part in _components(colours, smallest)]
            apart = len(parts) > 1 and min(part.score for part in parts) > whole.score
            detections += parts if apart else [whole]
        return sorted(detections, key=lambda detection: -detection.score)

    def colour(self, image_HWC: Image, detection: Detection) -> str:
        """The palette colour nearest to the thing's inside; its edge is mixed with the background and left out."""
        mask = detection.mask_HW
        inside = mask & ~_grow(~mask)
        pixels = image_HWC[inside if inside.sum() >= 4 else mask].astype(np.float32)
        background = background_colour(image_HWC)
        _, distance_K = _match(np.median(pixels, axis=0) - background, background, PALEST)
        return list(COLOURS)[int(distance_K.argmin())]


def background_colour(image_HWC: Image) -> Floats:
    median_C: Floats = np.median(_border(image_HWC), axis=0).astype(np.float32)
    return median_C


def _border(picture: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The outermost pixels, as one list."""
    return np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])


def _plainness(strength_HW: Floats) -> float:
    """1 for a picture with a plain background, down to 0 if half of its border is something else."""
    plain = (_border(strength_HW) < FOREGROUND).mean()
    return float(np.clip((plain - 0.5) / 0.3, 0, 1))


def _match(offset_C: Floats, background_C: Floats, palest: float) -> tuple[Floats, Floats]:
    """For each palette colour: how far along the line from the background to it an offset lies, and how far off it.

    An antialiased edge lies on the line to its own colour; by distance in RGB, a red thing's edge on white would be
    pink. The lines begin at `palest`. The distances are squared, less a term that is the same for all colours.
    """
    palette_KC = np.array(list(COLOURS.values()), np.float32) - background_C
    length_K = np.square(palette_KC).sum(-1) + 1e-6
    product_K = offset_C @ palette_KC.T
    along_K = np.clip(product_K / length_K, palest, 1)
    return product_K / length_K, length_K * along_K**2 - 2 * along_K * product_K


def _segment(image_HWC: Image) -> tuple[Labels, Floats]:
    """Each pixel's best palette colour, and how far the pixel is from the background (0) to that colour (1)."""
    background = background_colour(image_HWC)
    offset_HWC = image_HWC.astype(np.float32) - background
    label_HW = _match(_blur(offset_HWC), background, 0)[1].argmin(-1)
    along_HWK, _ = _match(offset_HWC, background, 0)
    strength_HW = np.take_along_axis(along_HWK, label_HW[..., None], -1)[..., 0]
    return label_HW, np.clip(strength_HW, 0, 1)


def _blur(image: Floats) -> Floats:
    """The mean over 3 x 3 pixels of the first two axes."""
    padded = np.pad(image, ((1, 1), (1, 1), *((0, 0) for _ in image.shape[2:])), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    mean: Floats = ((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9).astype(np.float32)
    return mean


def _components(key_HW: Labels, smallest: float) -> Iterator[Mask]:
    """The 4-connected regions of equal keys that have at least `smallest` pixels; key -1 belongs to no region."""
    height, width = key_HW.shape
    region = np.where(key_HW >= 0, np.arange(height * width).reshape(height, width), -1)
    down = (key_HW[1:] == key_HW[:-1]) & (key_HW[1:] >= 0)
    right = (key_HW[:, 1:] == key_HW[:, :-1]) & (key_HW[:, 1:] >= 0)
    while True:  # a region's largest pixel number spreads over it until nothing changes
        before = region.copy()
        for lower, upper, joined in ((region[1:], region[:-1], down), (region[:, 1:], region[:, :-1], right)):
            np.copyto(lower, np.maximum(lower, upper), where=joined)
            np.copyto(upper, np.maximum(lower, upper), where=joined)  # again: both are views of the same rows
        # Pointer jumping makes that fast: a pixel takes the region of the pixel that its region is named after.
        region = np.where(region >= 0, region.ravel()[region], -1)
        if np.array_equal(region, before):
            break
    names, sizes = np.unique(region[region >= 0], return_counts=True)
    for name in names[sizes >= max(smallest, 2)]:
        yield region == name


def _grow(mask_HW: Mask) -> Mask:
    """The mask and the pixels beside, above and below it."""
    grown = mask_HW.copy()
    grown[1:] |= mask_HW[:-1]
    grown[:-1] |= mask_HW[1:]
    grown[:, 1:] |= mask_HW[:, :-1]
    grown[:, :-1] |= mask_HW[:, 1:]
    return grown


def _classify(region_HW: Mask, strength_HW: Floats, plain: float) -> Detection:
    """The shape that fits a region best, with a score of how sure that is."""
    peak = float(np.percentile(strength_HW[region_HW], 75))
    near_HW = _grow(region_HW)
    soft_HW: Floats = np.where(near_HW, np.minimum(strength_HW / peak, 1), 0).astype(np.float32)
    ideals_SHW = np.stack(list(_ideals(soft_HW)))
    blurred_SHW = np.where(near_HW, _blur(ideals_SHW.transpose(1, 2, 0)).transpose(2, 0, 1), 0)
    # A blurred picture is compared with blurred ideals: all three with the one blur that fits the region best.
    mixtures = (((1 - k) * ideals_SHW + k * blurred_SHW).astype(np.float32) for k in (0, 0.5, 1))
    overlap_S = max((_overlaps(soft_HW, ideals) for ideals in mixtures), key=np.max)
    odds_S = np.exp(SHARPNESS * (overlap_S - NO_SHAPE))
    mask = region_HW & (soft_HW > 0.5)
    ys, xs = np.nonzero(mask)
    box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
    return Detection(SHAPES[int(odds_S.argmax())], plain * float(odds_S.max() / (1 + odds_S.sum())), box, mask)


def _ideals(soft_HW: Floats) -> Iterator[Floats]:
    """A circle, a square and a triangle of the region's area and centroid (see `coverage` for their proportions)."""
    side = soft_HW.shape[0]
    area = float(soft_HW.sum()) / side**2
    axis = (np.arange(side) + 0.5) / side
    x, y = (float(soft_HW.sum(axis=k) @ axis) / (area * side**2) for k in (0, 1))
    centred = Thing("circle", "", x, y, float(np.sqrt(area / np.pi)))
    r = float(np.sqrt(area / (1.05 * 1.9)))
    yield coverage(centred, side)
    yield coverage(replace(centred, shape="square", r=float(np.sqrt(area) / 2)), side)
    yield coverage(replace(centred, shape="triangle", r=r, y=y - 0.95 * r / 3), side)  # its centroid lies below


def _overlaps(soft_HW: Floats, ideals_SHW: Floats) -> Floats:
    """Intersection over union with each of the ideals, for soft masks."""
    overlap_S: Floats = np.minimum(soft_HW, ideals_SHW).sum((1, 2)) / np.maximum(soft_HW, ideals_SHW).sum((1, 2))
    return overlap_S

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image as PilImage
from PIL import ImageFilter

from data_prep.shapes import world
from data_prep.shapes.world import Description, Scene, Thing
from pipelines.evaluation.judges import Image, ShapeJudge, _components

JUDGE = ShapeJudge()


def picture(*things: Thing, size: int = 32) -> Image:
    return world.render(Scene("", things, Description(())), size)


def named(image: Image, threshold: float = 0.3) -> list[tuple[str, str]]:
    kept = [found for found in JUDGE.detect(image) if found.score > threshold]
    return sorted((JUDGE.colour(image, found), found.label) for found in kept)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([16, 32]))
def test_it_names_every_thing_of_a_scene(seed: int, size: int) -> None:
    scene = world.sample_scene(random.Random(seed))
    image = world.render(scene, size)
    assert named(image, 0.9) == named(image) == sorted((thing.colour, thing.shape) for thing in scene.things)
    for thing in scene.things:
        boxes = np.array([found.box for found in JUDGE.detect(image)]) / size
        centres, extents = (boxes[:, 2:] + boxes[:, :2]) / 2, boxes[:, 2:] - boxes[:, :2]
        offsets = np.abs(centres - (thing.x, thing.y)).max(axis=1)
        assert offsets.min() <= 1 / size
        assert np.abs(extents[offsets.argmin()] - 2 * thing.r).max() <= 0.2 * thing.r + 1.6 / size


def spoil(image: Image, how: str, rng: np.random.Generator) -> Image:
    pixels = image.astype(np.float64)
    if how == "soft":
        return np.asarray(PilImage.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
    if how == "pale":
        pixels = 255 - 0.65 * (255 - pixels)
    elif how == "noisy":
        pixels += rng.normal(0, 25, pixels.shape)
    elif how == "tinted":
        pixels = pixels * rng.uniform(0.9, 1, 3) + rng.uniform(-15, 15, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("how", ["soft", "pale", "noisy", "tinted"])
def test_it_sees_through_what_a_small_model_gets_wrong(how: str) -> None:
    rng = np.random.default_rng(0)
    right = 0
    for seed in range(100):
        scene = world.sample_scene(random.Random(seed))
        image = spoil(world.render(scene, 32), how, rng)
        right += named(image) == sorted((thing.colour, thing.shape) for thing in scene.things)
    assert right >= 97


def test_touching_things_of_two_colours_are_two() -> None:
    square, circle = Thing("square", "blue", 0.35, 0.5, 0.19), Thing("circle", "red", 0.68, 0.5, 0.17)
    assert named(picture(square, circle)) == [("blue", "square"), ("red", "circle")]


def test_a_thing_that_is_no_shape_scores_low() -> None:
    bar = picture(*(Thing("square", "red", x, 0.5, 0.09) for x in (0.2, 0.35, 0.5, 0.65, 0.8)))
    assert named(bar) == []
    ring = picture(Thing("circle", "green", 0.5, 0.5, 0.3))
    ring[11:21, 11:21] = 255
    assert named(ring) == []


def test_a_shape_between_two_is_neither_for_certain() -> None:
    square = picture(Thing("square", "green", 0.5, 0.5, 0.25)).astype(float)
    circle = picture(Thing("circle", "green", 0.5, 0.5, 0.25)).astype(float)
    (found,) = JUDGE.detect(((square + circle) / 2).astype(np.uint8))
    assert 0.3 < found.score < 0.9


def test_an_empty_picture_has_nothing_in_it() -> None:
    assert JUDGE.detect(picture()) == []
    assert JUDGE.detect(np.zeros((32, 32, 3), np.uint8)) == []


@given(arrays.arrays(np.intp, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(-1, 1)))
def test_components_are_those_of_a_flood_fill(key_HW: npt.NDArray[np.intp]) -> None:
    expected, todo = set(), {(int(y), int(x)) for y, x in zip(*np.nonzero(key_HW >= 0), strict=True)}
    while todo:
        stack, region = [todo.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in todo and key_HW[near] == key_HW[y, x]:
                    todo.remove(near)
                    stack.append(near)
        if len(region) >= 2:
            expected.add(frozenset(region))
    found = [
        frozenset((int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)) for mask in _components(key_HW, 2)
    ]
    assert len(found) == len(expected)
    assert set(found) == expected

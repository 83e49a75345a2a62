from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shapes import world
from data_prep.shapes.world import Captions, Description, Fact, Noun, Scene, Thing
from tests.drawing import correct_picture

SCENES = 6000


@pytest.fixture(scope="module")
def corpus() -> list[tuple[Scene, Captions]]:
    made = []
    for index in range(SCENES):
        rng = random.Random(f"corpus/{index}")
        scene = world.sample_scene(rng)
        made.append((scene, world.captions(scene, rng)))
    return made


# The two checks below are written anew, on plain words and on drawn things: `world.facts` may not vouch for itself.


def says(caption: str, fact: Fact) -> bool:
    def beside(shape: str) -> str:
        return rf"an? (\w+ )?{shape}\b"

    match fact:
        case ("place", size, shape, place):
            return bool(re.search(rf"\b{size} (\w+ )?{shape} {place}", caption))
        case ("count", number, colour, shape):
            return f" {number} {colour} {shape}s" in f" {caption}"
        case ("colour", size, colour, shape):
            return f"{size} {colour} {shape}" in caption
        case ("pair", colour, shape, other):
            return f"{colour} {shape}" in caption and bool(re.search(beside(other), caption))
        case ("relation", colour, shape, relation, other):
            forward = rf"{colour} {shape} {relation} {beside(other)}"
            backward = rf"{beside(other)} {world.OPPOSITE[relation]} an? {colour} {shape}"
            return bool(re.search(forward, caption) or re.search(backward, caption))
        case ("attributes", colour, shape, other_colour, other):
            return f"{colour} {shape}" in caption and f"{other_colour} {other}" in caption
    raise AssertionError(fact)


def shows(things: tuple[Thing, ...], fact: Fact) -> bool:
    def has(colour: str, shape: str) -> bool:
        return any((thing.colour, thing.shape) == (colour, shape) for thing in things)

    def lone(size: str, shape: str) -> bool:
        low, high = world.RADII[size]
        return len(things) == 1 and things[0].shape == shape and low <= things[0].r <= high

    match fact:
        case ("place", size, shape, place):
            x, y = world.PLACES[place]
            return lone(size, shape) and np.hypot(things[0].x - x, things[0].y - y) < 0.1
        case ("count", number, colour, shape):
            return len(things) == world.NUMBERS.index(number) and {(t.colour, t.shape) for t in things} == {
                (colour, shape)
            }
        case ("colour", size, colour, shape):
            return lone(size, shape) and has(colour, shape)
        case ("pair", colour, shape, other):
            return has(colour, shape) and any(thing.shape == other for thing in things)
        case ("relation", colour, shape, relation, other):
            dx, dy = world.RELATIONS[relation]
            pairs = [(a, b) for a in things for b in things if (a.colour, a.shape, b.shape) == (colour, shape, other)]
            return any((a.x - b.x) * dx + (a.y - b.y) * dy > 0.2 for a, b in pairs)
        case ("attributes", colour, shape, other_colour, other):
            return has(colour, shape) and has(other_colour, other)
    raise AssertionError(fact)


def test_no_training_caption_or_scene_has_a_held_out_combination(corpus: list[tuple[Scene, Captions]]) -> None:
    for scene, said in corpus:
        for fact in world.held_out():
            assert not shows(scene.things, fact), (scene, fact)
            assert not any(says(caption, fact) for caption in (said.short, said.medium, said.long)), (said, fact)


def test_the_checks_see_what_they_look_for() -> None:
    nouns_of = {"place": 1, "count": 1, "colour": 1, "pair": 2, "relation": 2, "attributes": 2}
    for fact in world.held_out():
        found = 0
        for index in range(4000):
            rng = random.Random(index)
            count = world.NUMBERS.index(fact[1]) if fact[0] == "count" else 1
            shapes = rng.sample(world.SHAPES, nouns_of[fact[0]])
            scene = world.draw(Description(tuple(Noun(shape, count) for shape in shapes)), rng)
            held = fact in world.facts(scene.description)
            assert shows(scene.things, fact) == held
            assert says(world.text(scene.description), fact) == held
            found += held
            if found == 2:
                break
        assert found == 2, fact


def test_the_parts_of_a_held_out_combination_are_seen_two_by_two(corpus: list[tuple[Scene, Captions]]) -> None:
    spoken = [
        set(re.findall(r"\w+", said.long.replace("circles", "circle").replace("squares", "square")))
        for _, said in corpus
    ]
    for words in spoken:
        words.update({"triangle"} & {word.rstrip("s") for word in words})
    for phrase in (phrase for phrases in world.HELD_OUT.values() for phrase in phrases):
        telling = {word.rstrip("s") for word in re.findall(r"\w+", phrase)} - {
            "a",
            "an",
            "and",
            "the",
            "of",
            "in",
            "on",
            "at",
        }
        for pair in combinations(sorted(telling), 2):
            assert sum(words.issuperset(pair) for words in spoken) >= SCENES // 400, (phrase, pair)


def test_captions_are_true_and_grow(corpus: list[tuple[Scene, Captions]]) -> None:
    for scene, said in corpus[:1500]:
        everything = set(world.facts(scene.description))
        for caption in (said.short, said.medium, said.long):
            assert set(world.facts(world.parse(caption))) <= everything, (scene, caption)
        assert world.parse(said.long) == scene.description
        shapes = Counter(thing.shape for thing in scene.things)
        assert shapes == Counter({noun.shape: noun.count for noun in world.parse(said.short).nouns})
        assert len(said.short) < len(said.medium) < len(said.long)


def test_shares_are_kept() -> None:
    shares = {"counting": 3.0, "colors": 1.0}
    kinds = Counter(world.sample_scene(random.Random(i), shares).kind for i in range(2000))
    assert set(kinds) == set(shares)
    assert kinds["counting"] / 2000 == pytest.approx(0.75, abs=0.04)


nouns = st.builds(
    Noun,
    st.sampled_from(world.SHAPES),
    st.integers(1, 4),
    st.sampled_from([None, *world.COLOURS]),
    st.sampled_from([None, *world.SIZES]),
)


@given(
    st.lists(nouns, min_size=1, max_size=2),
    st.sampled_from([None, *world.RELATIONS]),
    st.sampled_from([None, *world.PLACES]),
)
def test_parse_is_the_inverse_of_text(said: list[Noun], relation: str | None, place: str | None) -> None:
    description = Description(tuple(said), relation if len(said) == 2 else None, place if len(said) == 1 else None)
    assert world.parse(f"a photo of {world.text(description)} on a white background") == description


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.sampled_from([16, 32, 64]))
def test_things_touch_neither_each_other_nor_the_border(seed: int, size: int) -> None:
    scene = world.sample_scene(random.Random(seed))
    covers = [world.coverage(thing, size) for thing in scene.things]
    for cover in covers:
        # A pixel that is half a thing's belongs to it; its antialiased edge may fade into the last row.
        edge = np.concatenate([cover[0], cover[-1], cover[:, 0], cover[:, -1]])
        assert edge.max() < 0.5
    for a, b in combinations(covers, 2):
        assert (a + b).max() <= 1
        rows, columns = np.nonzero(a >= 0.5)
        other_rows, other_columns = np.nonzero(b >= 0.5)
        gap = np.maximum(abs(rows[:, None] - other_rows), abs(columns[:, None] - other_columns)).min()
        assert gap >= 2  # a free pixel in between


@pytest.mark.parametrize("shape", world.SHAPES)
def test_coverage_agrees_with_supersampling(shape: str) -> None:
    thing = Thing(shape, "red", 0.47, 0.52, 0.23)
    fine = (world.coverage(thing, 32 * 16) >= 0.5).reshape(32, 16, 32, 16).mean((1, 3))
    error = np.abs(world.coverage(thing, 32) - fine)
    assert error.mean() < 0.003
    assert error.max() < 0.3  # at a corner, where the distance to the outline rounds it off


def test_render_paints_the_colours_on_white() -> None:
    scene = Scene(
        "", (Thing("square", "blue", 0.3, 0.5, 0.15), Thing("circle", "red", 0.7, 0.5, 0.15)), Description(())
    )
    image = world.render(scene, 32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert tuple(image[16, 9]) == world.COLOURS["blue"]
    assert tuple(image[16, 22]) == world.COLOURS["red"]
    assert tuple(image[0, 0]) == world.BACKGROUND


def test_colours_are_far_apart() -> None:
    for a, b in combinations([*world.COLOURS.values(), world.BACKGROUND], 2):
        assert np.linalg.norm(np.subtract(a, b)) > 90


def test_a_prompts_picture_is_drawn_from_its_words_and_seed() -> None:
    prompt = "a photo of a red circle left of a square"
    first = correct_picture(prompt, 0, 32)
    assert np.array_equal(first, correct_picture(prompt, 0, 32))
    assert not np.array_equal(first, correct_picture(prompt, 1, 32))
    left, right = first[:, :16].reshape(-1, 3), first[:, 16:].reshape(-1, 3)
    red = np.array(world.COLOURS["red"])
    assert (left == red).all(-1).any()
    assert not (right == red).all(-1).any()


def test_held_out_is_about_the_whole_scene() -> None:
    scene = world.draw(world.parse("a green square and a triangle"), random.Random(0))
    assert world.is_held_out(scene)
    seen = world.parse("a red square left of a pink triangle")
    assert not world.is_held_out(seen)
    assert world.is_held_out(replace(seen, relation="right of"))
    assert world.is_held_out(world.parse("a triangle left of a red square"))
    assert world.is_held_out(world.parse("a cyan triangle and a red square"))

"""The shape world: small scenes of coloured shapes with exact captions, on which a small model is trained and measured.

A `Description` is the meaning of a caption (nouns, a relation, a place), a `Scene` is what is drawn. `parse` turns a
caption into a description and `text` a description into a caption; `draw` makes a scene, choosing at random what the
description leaves open; `render` makes pixels. `HELD_OUT` lists combinations that only evaluation prompts have: no
training scene has one, so no training caption does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Fact = tuple[str, ...]

SHAPES = ("circle", "square", "triangle")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 20, 40),
    "orange": (255, 130, 0),
    "yellow": (255, 225, 20),
    "green": (0, 150, 50),
    "cyan": (0, 205, 225),
    "blue": (30, 60, 225),
    "purple": (125, 35, 175),
    "pink": (255, 95, 185),
}
BACKGROUND = (255, 255, 255)
NUMBERS = ("no", "one", "two", "three", "four")
SIZES = ("small", "large")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
}
QUADRANTS = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))
# Half-extents as fractions of the side: with the centres above, no two things come closer than 0.08 of the side (more
# than a pixel even at 16 px), and none comes closer than BORDER to the border.
RADII = {
    "small": (0.165, 0.175),
    "medium": (0.225, 0.235),
    "large": (0.295, 0.305),
    "two": (0.175, 0.185),
    "many": (0.155, 0.165),
}
BORDER = 0.04
JITTER = 0.01  # of a centre: small, so that a few minutes of training suffice to learn what words mean

# The share of each kind among training scenes; the kinds are GenEval's six tasks.
SHARES: Mapping[str, float] = {
    "single_object": 0.17,
    "two_object": 0.20,
    "counting": 0.13,
    "colors": 0.16,
    "position": 0.14,
    "color_attr": 0.20,
}


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


# Combinations of three or more attributes for evaluation. No training scene has one, but some have each pair of them.
HELD_OUT: Mapping[str, tuple[str, ...]] = {
    "single_object": _phrases(  # size, shape and place of a single thing
        "a large circle on the left, a small square at the bottom, a large triangle in the middle, "
        "a large circle on the right, a small triangle on the left, a small triangle on the right, "
        "a small square in the middle, a small circle at the top"
    ),
    "two_object": _phrases(  # a coloured shape beside another shape of whatever colour
        "a red circle and a square, a blue circle and a triangle, a cyan square and a circle, "
        "a green square and a triangle, a pink triangle and a circle, a yellow triangle and a square"
    ),
    "counting": _phrases(  # number, colour and shape
        "three red circles, four orange squares, two yellow triangles, four green circles, two cyan squares, "
        "three blue triangles, two purple circles, three pink squares, four red triangles, three cyan circles, "
        "four blue squares, two green triangles"
    ),
    "colors": _phrases(  # size, colour and shape of a single thing
        "a small green circle, a large yellow square, a small blue triangle, a large purple circle, "
        "a small pink square, a large orange triangle, a small red circle, a large green square, "
        "a small yellow triangle, a large cyan circle, a small orange square, a large pink triangle"
    ),
    "position": _phrases(  # a coloured shape on one side of another shape of whatever colour
        "a pink circle below a triangle, a purple square below a circle, a cyan circle above a triangle, "
        "a yellow circle right of a square, a blue square left of a triangle, a red square right of a triangle, "
        "a purple triangle right of a circle, a cyan triangle below a square, a green triangle left of a circle, "
        "a red triangle above a square, a yellow square above a circle, an orange circle left of a square"
    ),
    "color_attr": _phrases(  # two coloured shapes together
        "a pink circle and a cyan triangle, a blue square and a pink triangle, "
        "an orange square and a purple triangle, a blue circle and a red square, a pink circle and a purple square, "
        "a red square and a cyan triangle, a yellow circle and a purple triangle, "
        "an orange circle and a green square, a purple square and a green triangle, "
        "a yellow circle and a blue square, a cyan circle and a red triangle, a red circle and a green triangle"
    ),
}


@dataclass(frozen=True)
class Noun:
    """One or several equal things, such as "three red circles"; None stands for what a caption leaves out."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """One noun, perhaps at a place, or two nouns, perhaps the first in a relation to the second."""

    nouns: tuple[Noun, ...]
    relation: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Thing:
    """One drawn object: the centre of its box and its half-extent, as fractions of the image's side."""

    shape: str
    colour: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    kind: str
    things: tuple[Thing, ...]
    description: Description  # everything that can be said about it


# ------------------------------------------------------------------------------------------------- text


def noun_text(noun: Noun) -> str:
    words = " ".join(word for word in (noun.size, noun.colour, noun.shape) if word)
    if noun.count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[noun.count]} {words}s"


def text(description: Description) -> str:
    nouns = [noun_text(noun) for noun in description.nouns]
    joined = (f" {description.relation} " if description.relation else " and ").join(nouns)
    return f"{joined} {description.place}" if description.place else joined


_NOUN = re.compile(
    rf"(?P<count>an?|{'|'.join(NUMBERS[2:])}) (?:(?P<size>{'|'.join(SIZES)}) )?"
    rf"(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)})s?\b"
)


def parse(caption: str) -> Description:
    """The description that a caption of this world expresses; the inverse of `text`.

    "a red circle above two squares" has the nouns Noun("circle", 1, "red") and Noun("square", 2), related by "above".
    """
    matches = list(_NOUN.finditer(caption))
    assert matches, f"not a caption of the shape world: {caption!r}"
    nouns = tuple(
        Noun(m["shape"], 1 if m["count"] in ("a", "an") else NUMBERS.index(m["count"]), m["colour"], m["size"])
        for m in matches
    )
    between = caption[matches[0].end() : matches[1].start()].strip() if len(matches) == 2 else ""
    place = next((place for place in PLACES if place in caption), None)
    return Description(nouns, between if between in RELATIONS else None, place)


def facts(description: Description) -> Iterator[Fact]:
    """The combinations in a description that could be held out, each in a canonical form, the largest one last."""
    if len(description.nouns) == 1:
        noun = description.nouns[0]
        if noun.count > 1 and noun.colour:
            yield "count", NUMBERS[noun.count], noun.colour, noun.shape
        if noun.size and description.place:
            yield "place", noun.size, noun.shape, description.place
        if noun.size and noun.colour:
            yield "colour", noun.size, noun.colour, noun.shape
        return
    first, second = description.nouns
    for noun, other in ((first, second), (second, first)):
        if noun.colour:
            yield "pair", noun.colour, noun.shape, other.shape
    if relation := description.relation:
        for noun, side, other in ((first, relation, second), (second, OPPOSITE[relation], first)):
            if noun.colour:
                yield "relation", noun.colour, noun.shape, side, other.shape
    if first.colour and second.colour:
        first, second = sorted((first, second), key=lambda noun: noun.shape)
        yield "attributes", str(first.colour), first.shape, str(second.colour), second.shape


@cache
def held_out() -> frozenset[Fact]:
    """The combinations of HELD_OUT, in the form of `facts`."""
    return frozenset(list(facts(parse(phrase)))[-1] for phrases in HELD_OUT.values() for phrase in phrases)


def is_held_out(what: Scene | Description) -> bool:
    description = what.description if isinstance(what, Scene) else what
    return not held_out().isdisjoint(facts(description))


# ------------------------------------------------------------------------------------------------- scenes


def draw(description: Description, rng: random.Random, kind: str = "") -> Scene:
    """A scene that the description is true of; everything that it leaves open is chosen at random."""
    colours = rng.sample([c for c in COLOURS if all(c != noun.colour for noun in description.nouns)], 2)
    nouns = tuple(replace(noun, colour=noun.colour or colours[i]) for i, noun in enumerate(description.nouns))
    if len(nouns) == 2:
        relation = description.relation or rng.choice(list(RELATIONS))
        return Scene(kind, _two(nouns, relation, rng), Description(nouns, relation))
    (noun,) = nouns
    assert noun.colour is not None
    if noun.count > 1:
        spots = rng.sample(QUADRANTS, noun.count)
        things = [_thing(noun, x, y, "many", JITTER, rng) for x, y in spots]
        return Scene(kind, tuple(things), Description(nouns))
    size = noun.size or rng.choice(("small", "medium", "large"))
    place = description.place or rng.choice(list(PLACES))
    thing = _thing(noun, *PLACES[place], size, JITTER, rng)
    noun = replace(noun, size=size if size in SIZES else None)  # captions have no word for medium
    return Scene(kind, (thing,), Description((noun,), place=place))


def _thing(noun: Noun, x: float, y: float, size: str, jitter: float, rng: random.Random) -> Thing:
    assert noun.colour is not None
    r = rng.uniform(*RADII[size])
    low, high = 1.05 * r + BORDER, 1 - 1.05 * r - BORDER
    x, y = (min(max(centre + rng.uniform(-jitter, jitter), low), high) for centre in (x, y))
    return Thing(noun.shape, noun.colour, x, y, r)


def _two(nouns: tuple[Noun, ...], relation: str, rng: random.Random) -> tuple[Thing, ...]:
    """Two things, clearly apart along the relation's axis and nearly aligned across it."""
    dx, dy = RELATIONS[relation]
    things = []
    for noun, side in zip(nouns, (1, -1), strict=True):
        along, across = side * rng.uniform(0.25, 0.257), rng.uniform(-2 * JITTER, 2 * JITTER)
        x, y = 0.5 + along * dx + across * abs(dy), 0.5 + along * dy + across * abs(dx)
        things.append(_thing(noun, x, y, "two", 0.0, rng))
    return tuple(things)


def _describe(kind: str, rng: random.Random) -> Description:
    """The shapes and the number of things in a random scene of this kind; `draw` chooses the rest."""
    if kind in ("single_object", "colors"):
        return Description((Noun(rng.choice(SHAPES)),))
    if kind == "counting":
        return Description((Noun(rng.choice(SHAPES), count=rng.randint(2, 4)),))
    return Description(tuple(Noun(shape) for shape in rng.sample(SHAPES, 2)))


def sample_scene(rng: random.Random, shares: Mapping[str, float] = SHARES) -> Scene:
    """A random training scene, whose kind is drawn by the shares, without held-out combinations."""
    (kind,) = rng.choices(list(shares), weights=list(shares.values()))
    while True:
        scene = draw(_describe(kind, rng), rng, kind)
        if not is_held_out(scene):
            return scene


# ------------------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Captions:
    short: str
    medium: str
    long: str


def captions(scene: Scene, rng: random.Random, *, colourless: bool = False) -> Captions:
    """Three captions: what the scene's kind is about, the same in GenEval's phrasing with some details, everything."""
    full = scene.description
    bare = replace(full, nouns=tuple(replace(noun, size=None) for noun in full.nouns), place=None)
    if scene.kind != "position":
        bare = replace(bare, relation=None)
    if colourless:
        full, bare = _without_colours(full), _without_colours(bare)
    elif scene.kind not in ("colors", "color_attr"):
        bare = _without_colours(bare)
    return Captions(
        text(bare), f"a photo of {text(_detailed(bare, full, rng))}", f"a photo of {text(full)} on a white background"
    )


def _without_colours(description: Description) -> Description:
    return replace(description, nouns=tuple(replace(noun, colour=None) for noun in description.nouns))


def _detailed(bare: Description, full: Description, rng: random.Random) -> Description:
    """`bare` with some of the details of `full`, each with a probability of one half."""
    nouns = tuple(
        replace(
            noun,
            colour=noun.colour or (detailed.colour if rng.random() < 0.5 else None),
            size=detailed.size if rng.random() < 0.5 else None,
        )
        for noun, detailed in zip(bare.nouns, full.nouns, strict=True)
    )
    return replace(bare, nouns=nouns, place=full.place if rng.random() < 0.5 else None)


# ------------------------------------------------------------------------------------------------- pixels


def coverage(thing: Thing, size: int) -> npt.NDArray[np.float32]:
    """The fraction of each pixel that the thing covers, by the signed distance from its centre to the outline."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx, dy = np.abs(axis - thing.x)[None, :], (axis - thing.y)[:, None]
    r = thing.r
    if thing.shape == "circle":
        distance = np.hypot(dx, dy) - r
    elif thing.shape == "square":
        distance = np.maximum(dx, np.abs(dy)) - r
    else:  # upright, 2.1 r wide and 1.9 r high
        slant = (1.9 * dx - 1.05 * (dy + 0.95 * r)) / float(np.hypot(1.9, 1.05))
        distance = np.maximum(slant, dy - 0.95 * r)
    return np.clip(0.5 - distance * size, 0, 1).astype(np.float32)


def render(scene: Scene, size: int) -> Image:
    """The scene as uint8 [size, size, 3]."""
    image = np.full((size, size, 3), BACKGROUND, np.float32)
    for thing in scene.things:
        cover = coverage(thing, size)[..., None]
        image += cover * (np.array(COLOURS[thing.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)

"""The shape world: small scenes of coloured shapes with exact captions, to train and to measure a small model on.

A `Description` is what words say (nouns, a relation, a place), a `Scene` is what is drawn. `parse` and `text` go
between words and descriptions, `draw` fills in what the words leave open, `render` makes pixels. `HELD_OUT` lists the
combinations that evaluation asks for: no training scene has one, so no training caption can.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
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
JITTER = 0.01  # of a centre: small, so that minutes of training go into what words mean and not into where edges fall

# The kinds are GenEval's six tasks; this is the one place that says how often a training scene is of each.
SHARES: Mapping[str, float] = {
    "single_object": 0.17,
    "two_object": 0.20,
    "counting": 0.13,
    "colors": 0.16,
    "position": 0.14,
    "color_attr": 0.20,
}

# What evaluation asks for and no training scene has: combinations of three or more, whose parts are seen two by two.
HELD_OUT: Mapping[str, tuple[str, ...]] = {
    "single_object": (  # a lone thing's size, shape and place
        "a large circle on the left",
        "a small square at the bottom",
        "a large triangle in the middle",
        "a large circle on the right",
        "a small triangle on the left",
        "a small triangle on the right",
        "a small square in the middle",
        "a small circle at the top",
    ),
    "two_object": (  # a coloured shape beside another shape of whatever colour
        "a red circle and a square",
        "a blue circle and a triangle",
        "a cyan square and a circle",
        "a green square and a triangle",
        "a pink triangle and a circle",
        "a yellow triangle and a square",
    ),
    "counting": (  # so many of a colour and a shape
        "three red circles",
        "four orange squares",
        "two yellow triangles",
        "four green circles",
        "two cyan squares",
        "three blue triangles",
        "two purple circles",
        "three pink squares",
        "four red triangles",
        "three cyan circles",
        "four blue squares",
        "two green triangles",
    ),
    "colors": (  # a lone thing's size, colour and shape
        "a small green circle",
        "a large yellow square",
        "a small blue triangle",
        "a large purple circle",
        "a small pink square",
        "a large orange triangle",
        "a small red circle",
        "a large green square",
        "a small yellow triangle",
        "a large cyan circle",
        "a small orange square",
        "a large pink triangle",
    ),
    "position": (  # a coloured shape on one side of another shape of whatever colour
        "a pink circle below a triangle",
        "a purple square below a circle",
        "a cyan circle above a triangle",
        "a yellow circle right of a square",
        "a blue square left of a triangle",
        "a red square right of a triangle",
        "a purple triangle right of a circle",
        "a cyan triangle below a square",
        "a green triangle left of a circle",
        "a red triangle above a square",
        "a yellow square above a circle",
        "an orange circle left of a square",
    ),
    "color_attr": (  # two coloured shapes together
        "a pink circle and a cyan triangle",
        "a blue square and a pink triangle",
        "an orange square and a purple triangle",
        "a blue circle and a red square",
        "a pink circle and a purple square",
        "a red square and a cyan triangle",
        "a yellow circle and a purple triangle",
        "an orange circle and a green square",
        "a purple square and a green triangle",
        "a yellow circle and a blue square",
        "a cyan circle and a red triangle",
        "a red circle and a green triangle",
    ),
}


@dataclass(frozen=True)
class Noun:
    """So many equal things; None is what is left unsaid."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """One noun, perhaps at a place, or two nouns, perhaps the first standing in a relation to the second."""

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


# ------------------------------------------------------------------------------------------------- words


def noun_text(noun: Noun) -> str:
    words = " ".join(word for word in (noun.size, noun.colour, noun.shape) if word)
    if noun.count == 1:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{NUMBERS[noun.count]} {words}s"


def text(description: Description) -> str:
    nouns = [noun_text(noun) for noun in description.nouns]
    joined = (f" {description.relation} " if description.relation else " and ").join(nouns)
    return f"{joined} {description.place}" if description.place else joined


def _any(words: Iterable[str]) -> str:
    return "|".join(words)


_NOUN = re.compile(
    rf"(?P<count>an?|{_any(NUMBERS[2:])}) (?:(?P<size>{_any(SIZES)}) )?(?:(?P<colour>{_any(COLOURS)}) )?"
    rf"(?P<shape>{_any(SHAPES)})s?\b"
)


def parse(caption: str) -> Description:
    """The description that a caption of this world puts into words; the inverse of `text`."""
    found = list(_NOUN.finditer(caption))
    assert found, f"not a caption of the shape world: {caption!r}"
    nouns = tuple(
        Noun(m["shape"], 1 if m["count"] in ("a", "an") else NUMBERS.index(m["count"]), m["colour"], m["size"])
        for m in found
    )
    between = caption[found[0].end() : found[1].start()].strip() if len(found) == 2 else ""
    place = next((place for place in PLACES if place in caption), None)
    return Description(nouns, between if between in RELATIONS else None, place)


def facts(description: Description) -> Iterator[Fact]:
    """The combinations in a description that could be held out, each in one canonical form, the largest last."""
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
    """The combinations that only evaluation prompts have."""
    return frozenset(list(facts(parse(phrase)))[-1] for phrases in HELD_OUT.values() for phrase in phrases)


def is_held_out(what: Scene | Description) -> bool:
    description = what.description if isinstance(what, Scene) else what
    return not held_out().isdisjoint(facts(description))


# ------------------------------------------------------------------------------------------------- scenes


def draw(description: Description, rng: random.Random, kind: str = "") -> Scene:
    """A scene that the description is true of, everything unsaid chosen at random."""
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
    said = replace(noun, size=size if size in SIZES else None)
    return Scene(kind, (thing,), Description((said,), place=place))


def _thing(noun: Noun, x: float, y: float, size: str, jitter: float, rng: random.Random) -> Thing:
    assert noun.colour is not None
    r = rng.uniform(*RADII[size])
    low, high = 1.05 * r + BORDER, 1 - 1.05 * r - BORDER
    x, y = (min(max(centre + rng.uniform(-jitter, jitter), low), high) for centre in (x, y))
    return Thing(noun.shape, noun.colour, x, y, r)


def _two(nouns: tuple[Noun, ...], relation: str, rng: random.Random) -> tuple[Thing, ...]:
    """Two things, clearly apart along the relation's axis and nearly level across it."""
    dx, dy = RELATIONS[relation]
    things = []
    for noun, side in zip(nouns, (1, -1), strict=True):
        along, across = side * rng.uniform(0.25, 0.257), rng.uniform(-2 * JITTER, 2 * JITTER)
        x, y = 0.5 + along * dx + across * abs(dy), 0.5 + along * dy + across * abs(dx)
        things.append(_thing(noun, x, y, "two", 0.0, rng))
    return tuple(things)


def _describe(kind: str, rng: random.Random) -> Description:
    """What a scene of this kind is about, before anything else is chosen."""
    if kind in ("single_object", "colors"):
        return Description((Noun(rng.choice(SHAPES)),))
    if kind == "counting":
        return Description((Noun(rng.choice(SHAPES), count=rng.randint(2, 4)),))
    return Description(tuple(Noun(shape) for shape in rng.sample(SHAPES, 2)))


def sample_scene(rng: random.Random, shares: Mapping[str, float] = SHARES) -> Scene:
    """A training scene: of a kind drawn by the shares, and free of held-out combinations."""
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
    """Three captions: what the scene's kind is about, that in GenEval's phrasing with some details, and everything."""
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
    """Some of the details that `full` knows, each with an even chance, put into `bare`."""
    nouns = tuple(
        replace(
            said,
            colour=said.colour or (known.colour if rng.random() < 0.5 else None),
            size=known.size if rng.random() < 0.5 else None,
        )
        for said, known in zip(bare.nouns, full.nouns, strict=True)
    )
    return replace(bare, nouns=nouns, place=full.place if rng.random() < 0.5 else None)


# ------------------------------------------------------------------------------------------------- pixels


def coverage(thing: Thing, size: int) -> npt.NDArray[np.float32]:
    """How much of each pixel the thing covers: antialiased from the signed distance to its outline."""
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


def render_prompt(metadata: Mapping[str, object], seed: int, size: int) -> Image:
    """A true picture of an evaluation prompt, given as GenEval metadata."""
    prompt = str(metadata["prompt"])
    return render(draw(parse(prompt), random.Random(f"{seed}/{prompt}")), size)

"""DPG-Bench of the shape world: dense captions with graphs of questions, and a judge that answers them by geometry.

An item is a held-out combination of which everything is said: the scene that `world.draw` makes of it. Its questions
are about each thing, then, depending on that, its number, colour, size and place, and, depending on both, how two lie.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np

from data_prep.shapes import world
from data_prep.shapes.world import Description, Noun
from infra.causes import first_line
from pipelines.evaluation.answering import Answer, Unanswered
from pipelines.evaluation.dpg import Question
from pipelines.evaluation.geneval import THRESHOLD, relations
from pipelines.evaluation.judges import Detection, Image, ShapeJudge, background_colour
from pipelines.evaluation.prompts import TASKS

# ------------------------------------------------------------------------------------------------- questions


def shape_questions(per_task: int) -> list[Question]:
    """The questions of up to `per_task` items for each of GenEval's tasks."""
    return [
        question
        for task in TASKS
        for number, phrase in enumerate(world.HELD_OUT[task][:per_task])
        for question in _questions(f"{task}-{number}", _whole(phrase))
    ]


def _whole(phrase: str) -> Description:
    """Everything that can be said about a scene which the phrase is true of."""
    return world.draw(world.parse(phrase), random.Random(phrase)).description


def _questions(item: str, scene: Description) -> Iterator[Question]:
    prompt = f"a photo of {world.text(scene)} on a white background"
    numbers = count(1)

    def asked(parents: Sequence[int], about: str, text: str) -> Question:
        return Question(item, prompt, next(numbers), tuple(parents), about, text)

    things: list[int] = []
    for noun in scene.nouns:
        thing = asked([], f"entity - whole ({noun.shape})", f"Is there a {noun.shape}?")
        yield thing
        things.append(thing.number)
        yield from _attributes(partial(asked, [thing.number]), noun)
    first = scene.nouns[0].shape
    if scene.place:
        about = f"relation - spatial ({first}, {scene.place})"
        yield asked(things, about, f"Is the {first} {scene.place}?")
    if scene.relation:
        other = scene.nouns[1].shape
        about = f"relation - spatial ({first}, {other}, {scene.relation})"
        yield asked(things, about, f"Is the {first} {scene.relation} the {other}?")
    yield asked([], "global - background (white)", "Is the background white?")


def _attributes(asked: Callable[[str, str], Question], noun: Noun) -> Iterator[Question]:
    shape, several = noun.shape, noun.count > 1
    the = f"Are the {shape}s" if several else f"Is the {shape}"
    if several:
        number = world.NUMBERS[noun.count]
        yield asked(f"other - count ({shape}s, {number})", f"Are there {number} {shape}s?")
    yield asked(f"attribute - color ({shape}, {noun.colour})", f"{the} {noun.colour}?")
    if noun.size:
        yield asked(f"attribute - size ({shape}, {noun.size})", f"{the} {noun.size}?")


# ------------------------------------------------------------------------------------------------- the judge

_SHAPE = f"(?P<shape>{'|'.join(world.SHAPES)})"
_ALL = rf"(?:Is the|Are the) {_SHAPE}s?"
_THERE = re.compile(rf"Is there an? {_SHAPE}\?")
_COUNT = re.compile(rf"Are there (?P<number>{'|'.join(world.NUMBERS[2:])}) {_SHAPE}s\?")
_COLOUR = re.compile(rf"{_ALL} (?P<colour>{'|'.join(world.COLOURS)})\?")
_SIZE = re.compile(rf"{_ALL} (?P<size>{'|'.join(world.SIZES)})\?")
_PLACE = re.compile(rf"{_ALL} (?P<place>{'|'.join(world.PLACES)})\?")
_RELATION = re.compile(rf"{_ALL} (?P<relation>{'|'.join(world.RELATIONS)}) the (?P<other>{'|'.join(world.SHAPES)})\?")
_BACKGROUND = "Is the background white?"
WHITE = 230  # of 255, in every channel: nearer to white than to any colour of the palette
MIDDLE = 0.07  # share of the side by which a thing in the middle may be off; one on the left is off by twice that
# The area of a thing with the half-extent 1 (see `world.coverage`), and where its size is neither small nor large.
_AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.1 * 1.9 / 2}
_BETWEEN = {
    "small": (0.0, (world.RADII["small"][1] + world.RADII["medium"][0]) / 2),
    "large": ((world.RADII["medium"][1] + world.RADII["large"][0]) / 2, 1.0),
}


class ShapeAnswerer:
    """Reads pictures as GenEval's judge of the shape world does."""

    def answers(self, asked: Sequence[tuple[Image, Sequence[str]]]) -> list[list[Answer]]:
        return [_about(image, texts) for image, texts in asked]


def _about(image_HWC: Image, texts: Sequence[str]) -> list[Answer]:
    judge = ShapeJudge()
    try:
        seen = [thing for thing in judge.detect(image_HWC) if np.float32(thing.score) > THRESHOLD]
    except (ValueError, AssertionError) as error:
        return [Unanswered(first_line(error))] * len(texts)
    return [_answer(judge, image_HWC, seen, text) for text in texts]


def _answer(judge: ShapeJudge, image_HWC: Image, seen: Sequence[Detection], text: str) -> Answer:
    if text == _BACKGROUND:
        return _word(bool((background_colour(image_HWC) >= WHITE).all()))
    patterns = (_THERE, _COUNT, _COLOUR, _SIZE, _PLACE, _RELATION)
    match = next(filter(None, (pattern.fullmatch(text) for pattern in patterns)), None)
    if match is None:
        return Unanswered("the shape world's judge does not know this question")
    asked, things = match.groupdict(), [thing for thing in seen if thing.label == match["shape"]]
    if "number" in asked:
        return _word(len(things) == world.NUMBERS.index(asked["number"]))
    if "other" in asked:
        others = [thing for thing in seen if thing.label == asked["other"]]
        return _word(bool(things and others) and asked["relation"] in relations(things[0], others[0]))

    def holds(thing: Detection) -> bool:
        if "colour" in asked:
            return judge.colour(image_HWC, thing) == asked["colour"]
        if "size" in asked:
            low, high = _BETWEEN[asked["size"]]
            return low <= _half_extent(thing) <= high
        return "place" not in asked or _place(thing) == asked["place"]

    return _word(bool(things) and all(map(holds, things)))


def _word(holds: bool) -> str:
    return "yes" if holds else "no"


def _half_extent(thing: Detection) -> float:
    """As a share of the side. By the area, which a pixel more or less changes little even at 16 pixels."""
    return float(np.sqrt(thing.mask_HW.sum() / _AREA[thing.label]) / len(thing.mask_HW))


def _place(thing: Detection) -> str:
    """The place of `world.PLACES` that the centre of the thing's box is nearest to."""
    left, top, right, bottom = thing.box
    side = len(thing.mask_HW)
    x, y = (left + right) / 2 / side - 0.5, (top + bottom) / 2 / side - 0.5
    if max(abs(x), abs(y)) < MIDDLE:
        return "in the middle"
    if abs(x) >= abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"

"""Evaluation prompts in GenEval's metadata format, from a JSONL file or of the shape world. A line of such a file:

{"tag": "position", "include": [{"class": "square", "count": 1},
                                {"class": "circle", "count": 1, "position": ["left of", 0]}],
 "exclude": [], "prompt": "a photo of a circle left of a square"}
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.shapes import world
from data_prep.shapes.world import Description
from infra.errors import EvaluationError
from infra.problems import faults, settings_error
from infra.records import Plain

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TASKS: tuple[Task, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
Relation = Literal["left of", "right of", "above", "below"]


class Requirement(Plain):
    """At least `count` objects of a class, perhaps of a colour.

    `position` ("left of", 0) asks that they are left of the objects that requirement 0, an earlier one, asks for.
    """

    label: str = Field(validation_alias=AliasChoices("class", "label"), serialization_alias="class")
    count: int = Field(ge=1)
    color: str | None = None
    position: tuple[Relation, int] | None = None


class Prompt(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # published variants of the file have columns of their own
    tag: Task
    include: tuple[Requirement, ...] = Field(min_length=1)
    exclude: tuple[Requirement, ...] = ()  # of each there must be fewer than its `count`
    prompt: str = Field(min_length=1)

    @model_validator(mode="after")
    def _positions_point_back(self) -> Prompt:
        for index, required in enumerate(self.include):
            if required.position and not 0 <= required.position[1] < index:
                raise ValueError(
                    f"requirement {index} stands in a relation to {required.position[1]}, not an earlier one"
                )
        return self

    def metadata(self) -> dict[str, object]:
        """The prompt as a line of GenEval's file."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


def load_prompts(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"the prompts in {path} cannot be read ({type(error).__name__})",
            remedy="name a JSONL file of GenEval metadata",
        ) from None
    return parse_prompts(lines, str(path))


def parse_prompts(lines: Iterable[str], source: str) -> list[Prompt]:
    prompts = [_read(line, f"{source}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise EvaluationError(f"{source} holds no prompts", remedy="name a JSONL file of GenEval metadata")
    return prompts


def _read(line: str, place: str) -> Prompt:
    data: Any = None
    with suppress(ValueError, RecursionError):
        data = json.loads(line)
    if not isinstance(data, dict):
        raise EvaluationError(f"{place} is no JSON object", remedy="correct the line, or leave it out")
    try:
        return Prompt.model_validate(data)
    except ValidationError as error:
        wrong = settings_error(faults(Prompt, error, data, {}))
        raise EvaluationError(f"{place}: {wrong.message}", remedy="correct the line, or leave it out") from None


# ------------------------------------------------------------------------------------------------- the shape world


def shape_prompts(per_task: int = 12) -> list[Prompt]:
    """Up to `per_task` prompts a task, each for a combination of objects that is held out of the training scenes.

    First come all combinations, then those of two objects again in reverse: "a square right of a circle".
    """
    prompts: list[Prompt] = []
    for task in TASKS:
        phrases = [world.parse(phrase) for phrase in world.HELD_OUT[task]]
        swapped = [_swapped(phrase) for phrase in phrases if len(phrase.nouns) == 2]
        prompts += [_prompt(task, phrase) for phrase in (phrases + swapped)[:per_task]]
    return prompts


def other_shape_prompts(per_task: int, seed: int = 0) -> list[Prompt]:
    """Prompts of combinations that training scenes have, for choices that must not be made on the ones above."""
    rng, prompts = random.Random(seed), []
    for task in TASKS:
        phrases: dict[str, Description] = {}
        for _ in range(100 * per_task):  # some tasks have few combinations
            scene = world.sample_scene(rng, {task: 1.0})
            phrase = world.captions(scene, rng).medium.removeprefix("a photo of ")
            phrases.setdefault(phrase, world.parse(phrase))
            if len(phrases) == per_task:
                break
        prompts += [_prompt(task, phrase) for phrase in phrases.values()]
    return prompts


def _swapped(phrase: Description) -> Description:
    return Description(phrase.nouns[::-1], world.OPPOSITE[phrase.relation] if phrase.relation else None)


def _prompt(task: Task, description: Description) -> Prompt:
    """A phrase with the requirements that GenEval checks in this task; colours only in `colors` and `color_attr`."""
    with_colour = task in ("colors", "color_attr")
    include = [
        Requirement(label=noun.shape, count=noun.count, color=noun.colour if with_colour else None)
        for noun in description.nouns
    ]
    exclude: list[Requirement] = []
    first = description.nouns[0]
    if description.relation:
        subject, target = include
        include = [target, subject.model_copy(update={"position": (description.relation, 0)})]
    if task == "counting":
        exclude = [Requirement(label=first.shape, count=first.count + 1)]
    if task == "single_object":
        # There are only three shapes, so a wrong picture often holds the right shape by chance: no other is allowed.
        exclude = [Requirement(label=shape, count=1 + (shape == first.shape)) for shape in world.SHAPES]
    return Prompt(
        tag=task, include=tuple(include), exclude=tuple(exclude), prompt=f"a photo of {world.text(description)}"
    )

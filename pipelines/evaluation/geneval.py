"""The GenEval protocol (arXiv 2310.11513): what a judge detects in a picture, compared with what the prompt asks for.

Thresholds, the rule for spatial relations, the order of checks and the words of the reasons are those of the published
code; the judge is exchangeable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.detector.objects import COLOURS
from pipelines.evaluation.judges import Detection, Image, Judge
from pipelines.evaluation.prompts import TASKS, Prompt, Requirement, Task

# Compared strictly and in float32, as a detector's scores are: in float64 a score of 0.3 would be above 0.3.
THRESHOLD = np.float32(0.3)
COUNTING_THRESHOLD = np.float32(0.9)
MOST_OBJECTS = 16  # of a class
SHRINK = 0.1  # share of both objects' sizes together by which their offset is reduced
RELATION_THRESHOLD = 0.5  # on the reduced offset over the length of the whole one


@dataclass(frozen=True)
class Verdict:
    """The verdict on one picture; `reasons` say what is wrong, so they are empty if and only if it is correct."""

    task: Task
    number: int  # of the prompt
    prompt: str
    image: int  # of the prompt's pictures
    reasons: tuple[str, ...]

    @property
    def correct(self) -> bool:
        return not self.reasons


def evaluate(judge: Judge, prompts: Sequence[Prompt], images: Sequence[Sequence[Image | None]]) -> list[Verdict]:
    """Judge every picture of every prompt; a picture that could not be made (None) counts as wrong."""
    assert len(prompts) == len(images), f"{len(prompts)} prompts but pictures of {len(images)}"
    verdicts = []
    for number, (prompt, pictures) in enumerate(zip(prompts, images, strict=True)):
        for index, picture in enumerate(pictures):
            reasons = ("no picture",) if picture is None else tuple(judge_picture(judge, prompt, picture))
            verdicts.append(Verdict(prompt.tag, number, prompt.prompt, index, reasons))
    return verdicts


def by_task(verdicts: Iterable[Verdict]) -> dict[str, list[list[float]]]:
    """Task -> prompt -> 1.0 or 0.0 for each of its pictures, as `statistics` takes them."""
    grouped: dict[Task, dict[int, list[float]]] = {}
    for verdict in verdicts:
        grouped.setdefault(verdict.task, {}).setdefault(verdict.number, []).append(float(verdict.correct))
    return {task: list(grouped[task].values()) for task in TASKS if task in grouped}


def judge_picture(judge: Judge, prompt: Prompt, image_HWC: Image) -> list[str]:
    """Everything that is wrong with the picture."""
    detected = counted(prompt, judge.detect(image_HWC))
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # for each earlier requirement, the objects that meet it
    for required in prompt.include:
        objects = detected.get(required.label, [])[: required.count]
        wrong = _missing(judge, image_HWC, required, objects) or _misplaced(required, objects, groups)
        groups.append(None if wrong else objects)
        reasons += [wrong] if wrong else []
    for excluded in prompt.exclude:
        if (count := len(detected.get(excluded.label, []))) >= excluded.count:
            reasons.append(f"expected {excluded.label}<{excluded.count}, found {count}")
    return reasons


def counted(prompt: Prompt, detections: Iterable[Detection]) -> Mapping[str, Sequence[Detection]]:
    """The detections above the prompt's threshold, by class, best first, at most MOST_OBJECTS of each."""
    threshold = COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD
    by_label: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if np.float32(detection.score) > threshold:
            by_label.setdefault(detection.label, []).append(detection)
    return {label: objects[:MOST_OBJECTS] for label, objects in by_label.items()}


def coloured(prompt: Prompt, detections: Iterable[Detection]) -> list[Detection]:
    """The detections whose colours `judge_picture` asks for, so that a judge can look at them all at once."""
    detected, asked = counted(prompt, detections), dict[int, Detection]()
    for required in prompt.include:
        objects = detected.get(required.label, [])[: required.count]
        if required.color is not None and len(objects) == required.count:
            asked |= {id(detection): detection for detection in objects}
    return list(asked.values())


def _missing(judge: Judge, image_HWC: Image, required: Requirement, objects: Sequence[Detection]) -> str:
    """What is wrong if the objects, or those of the required colour, are too few; empty if they are enough."""
    if len(objects) < required.count:
        return f"expected {required.label}>={required.count}, found {len(objects)}"
    if required.color is None:
        return ""
    colours = [judge.colour(image_HWC, detection) for detection in objects]
    if (right := colours.count(required.color)) >= required.count:
        return ""
    others = [*COLOURS, *sorted(set(colours) - {*COLOURS, ""})]  # "": the colour of an object is not known
    seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in others if colour in colours)
    return f"expected {required.color} {required.label}>={required.count}, found {right} {required.color}; and {seen}"


def _misplaced(
    required: Requirement, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
) -> str:
    """What is wrong if not every object stands in the required relation to every target; empty if all do."""
    if required.position is None:
        return ""
    relation, index = required.position
    targets = groups[index]
    if targets is None:
        return f"no target for {required.label} to be {relation}"
    for detection in objects:
        for target in targets:
            if relation not in (sides := relations(detection, target)):
                return f"expected {required.label} {relation} target, found {' and '.join(sorted(sides))} target"
    return ""


def relations(a: Detection, b: Detection) -> set[str]:
    """On which sides of b a lies, such as {"left of", "above"}.

    The offset of their centres is reduced by a share of their sizes, then divided by the length of the whole offset.
    """
    box_a, box_b = (np.asarray(detection.box, np.float64).reshape(2, 2) for detection in (a, b))
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    sizes = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    shrunk = np.maximum(np.abs(offset) - SHRINK * sizes, 0) * np.sign(offset)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    sides = {
        "left of": dx < -RELATION_THRESHOLD,
        "right of": dx > RELATION_THRESHOLD,
        "above": dy < -RELATION_THRESHOLD,
        "below": dy > RELATION_THRESHOLD,
    }
    return {side for side, holds in sides.items() if holds}

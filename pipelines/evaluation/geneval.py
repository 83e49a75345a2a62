"""The GenEval protocol: what a judge sees in a picture, held against what the prompt asks for.

Thresholds, the relation rule and the order of checks follow the published evaluation; the judge is exchangeable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.judges import Detection, Image, Judge
from pipelines.evaluation.prompts import TASKS, Prompt, Requirement, Task

# Compared strictly and in float32, as a detector's scores are: in float64 a score of 0.3 would be above 0.3.
THRESHOLD = np.float32(0.3)
COUNTING_THRESHOLD = np.float32(0.9)
MOST_OBJECTS = 16  # of a class
SHRINK = 0.1  # of both objects' sizes together, taken off their offset
RELATION_THRESHOLD = 0.5

Found = Mapping[str, Sequence[Detection]]


@dataclass(frozen=True)
class Verdict:
    """One picture, judged; `reasons` is empty if and only if it is correct."""

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
    prompts: dict[tuple[Task, int], list[float]] = {}
    for verdict in verdicts:
        prompts.setdefault((verdict.task, verdict.number), []).append(float(verdict.correct))
    grouped: dict[str, list[list[float]]] = {}
    for task in TASKS:
        if scores := [scores for (of, _), scores in prompts.items() if of == task]:
            grouped[task] = scores
    return grouped


def judge_picture(judge: Judge, prompt: Prompt, image_HWC: Image) -> list[str]:
    """Everything that is wrong with the picture."""
    found = _found(judge.detect(image_HWC), COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD)
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # what met each requirement so far
    for required in prompt.include:
        objects = found.get(required.label, [])[: required.count]
        wrong = _missing(judge, image_HWC, required, objects) or _misplaced(required, objects, groups)
        groups.append(None if wrong else objects)
        reasons += [wrong] if wrong else []
    for excluded in prompt.exclude:
        if (count := len(found.get(excluded.label, []))) >= excluded.count:
            reasons.append(f"expected {excluded.label}<{excluded.count}, found {count}")
    return reasons


def _found(detections: Iterable[Detection], threshold: np.float32) -> Found:
    """Detections by class, best first, those above the threshold only."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if np.float32(detection.score) > threshold:
            found.setdefault(detection.label, []).append(detection)
    return {label: objects[:MOST_OBJECTS] for label, objects in found.items()}


def _missing(judge: Judge, image_HWC: Image, required: Requirement, objects: Sequence[Detection]) -> str:
    """Why the objects are too few, or too few of the colour; empty if they are not."""
    if len(objects) < required.count:
        return f"expected {required.label}>={required.count}, found {len(objects)}"
    if required.color is None:
        return ""
    colours = [judge.colour(image_HWC, detection) for detection in objects]
    if colours.count(required.color) >= required.count:
        return ""
    return f"expected {required.color} {required.label}>={required.count}, found {', '.join(sorted(colours))}"


def _misplaced(
    required: Requirement, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
) -> str:
    """Why the objects do not all stand in the relation to all of the target's; empty if they do."""
    if required.position is None:
        return ""
    relation, index = required.position
    targets = groups[index]
    if targets is None:
        return f"no target for {required.label} to be {relation}"
    for detection in objects:
        for target in targets:
            if relation not in (true := relations(detection, target)):
                held = " and ".join(sorted(true)) or "no side of"
                return f"expected {required.label} {relation} target, found {held} target"
    return ""


def relations(a: Detection, b: Detection) -> set[str]:
    """On which sides of b a lies: their centres' offset, shrunk by their sizes, over the length of the unshrunk one."""
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

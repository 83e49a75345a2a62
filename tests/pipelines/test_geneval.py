from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage

from data_prep.shapes import world
from infra.errors import EvaluationError
from pipelines.evaluation import geneval
from pipelines.evaluation.judges import Detection, Image, Judge, ShapeJudge
from pipelines.evaluation.prompts import TASKS, Prompt, load_prompts, shape_prompts
from tests.drawing import correct_picture

BLANK = np.zeros((100, 100, 3), np.uint8)


@dataclass
class HandMade:
    """A judge that says what it is told."""

    detections: Sequence[Detection]
    colours: Sequence[str] = ()
    name: str = "hand-made"

    def detect(self, image_HWC: Image) -> Sequence[Detection]:
        return self.detections

    def colour(self, image_HWC: Image, detection: Detection) -> str:
        return self.colours[list(self.detections).index(detection)]


def seen(label: str, score: float = 0.95, x: float = 50, y: float = 50, w: float = 10, h: float = 10) -> Detection:
    return Detection(label, score, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), np.ones((1, 1), np.bool_))


def asks(tag: str, *include: dict[str, object], exclude: Sequence[dict[str, object]] = ()) -> Prompt:
    return Prompt.model_validate({"tag": tag, "include": include, "exclude": exclude, "prompt": "a photo of a test"})


def wrong(prompt: Prompt, *detections: Detection, colours: Sequence[str] = ()) -> list[str]:
    return geneval.judge_picture(HandMade(detections, colours), prompt, BLANK)


DOG = {"class": "dog", "count": 1}
CAT = {"class": "cat", "count": 1}


# ------------------------------------------------------------------------------------------------- the protocol


def test_scores_are_compared_strictly_in_float32() -> None:
    prompt = asks("single_object", DOG)
    just_above = float(np.nextafter(np.float32(0.3), np.float32(1)))
    assert float(np.float32(0.3)) > 0.3  # what a comparison of Python floats would get wrong
    assert wrong(prompt, seen("dog", float(np.float32(0.3)))) == ["expected dog>=1, found 0"]
    assert wrong(prompt, seen("dog", just_above)) == []


def test_counting_has_a_threshold_of_its_own() -> None:
    three = {"class": "dog", "count": 3}
    prompt = asks("counting", three, exclude=[{"class": "dog", "count": 4}])
    assert wrong(prompt, *[seen("dog", 0.91)] * 3) == []
    assert wrong(prompt, *[seen("dog", 0.91)] * 2, seen("dog", 0.9)) == ["expected dog>=3, found 2"]
    assert wrong(prompt, *[seen("dog", 0.91)] * 3, seen("dog", 0.9)) == []  # a doubtful fourth one is none
    assert wrong(prompt, *[seen("dog", 0.91)] * 4) == ["expected dog<4, found 4"]
    assert wrong(asks("two_object", three), *[seen("dog", 0.31)] * 3) == []


def test_at_most_sixteen_of_a_class() -> None:
    prompt = asks("counting", DOG, exclude=[{"class": "dog", "count": 17}])
    assert wrong(prompt, *[seen("dog")] * 40) == []


def test_another_class_does_not_count() -> None:
    assert wrong(asks("two_object", DOG, CAT), seen("dog"), seen("dog")) == ["expected cat>=1, found 0"]


def test_only_the_best_count_detections_are_checked() -> None:
    red_dog = asks("colors", {**DOG, "color": "red"})
    assert wrong(red_dog, seen("dog", 0.8), seen("dog", 0.9), colours=["blue", "red"]) == []
    assert wrong(red_dog, seen("dog", 0.9), seen("dog", 0.8), colours=["blue", "red"]) == [
        "expected red dog>=1, found 0 red; and 1 blue"
    ]


def test_colours_belong_to_their_objects() -> None:
    prompt = asks("color_attr", {**DOG, "color": "red"}, {**CAT, "color": "blue"})
    dog, cat = seen("dog"), seen("cat")
    assert wrong(prompt, dog, cat, colours=["red", "blue"]) == []
    assert wrong(prompt, dog, cat, colours=["blue", "red"]) == [
        "expected red dog>=1, found 0 red; and 1 blue",
        "expected blue cat>=1, found 0 blue; and 1 red",
    ]


def test_position_is_checked_against_the_earlier_requirement() -> None:
    prompt = asks("position", CAT, {**DOG, "position": ["left of", 0]})
    assert wrong(prompt, seen("cat", x=80), seen("dog", x=20)) == []
    assert wrong(prompt, seen("cat", x=20), seen("dog", x=80)) == ["expected dog left of target, found right of target"]
    assert wrong(prompt, seen("dog", x=20)) == ["expected cat>=1, found 0", "no target for dog to be left of"]
    assert wrong(prompt, seen("cat"), seen("dog")) == ["expected dog left of target, found  target"]


def test_a_relation_must_hold_for_every_pair() -> None:
    two_cats = asks("position", {**CAT, "count": 2}, {**DOG, "position": ["left of", 0]})
    dog = seen("dog", x=50)
    assert wrong(two_cats, dog, seen("cat", x=80), seen("cat", x=90)) == []
    assert wrong(two_cats, dog, seen("cat", x=80), seen("cat", x=10)) != []


def test_offsets_shrink_by_a_tenth_of_both_sizes() -> None:
    origin = seen("cat", x=0, y=0)
    # Offset 40 across, sizes 10 and 10: (40 - 2) / 40 = 0.95.
    assert geneval.relations(seen("dog", x=-40, y=0), origin) == {"left of"}
    assert geneval.relations(seen("dog", x=0, y=40), origin) == {"below"}
    # The offset is normalised unshrunk: (2.1, 0) shrinks to 0.1, which is far less than half of 2.1.
    assert geneval.relations(seen("dog", x=2.1, y=0), origin) == set()
    assert geneval.relations(seen("dog", x=4.1, y=0), origin) == {"right of"}  # 2.1 / 4.1
    assert geneval.relations(seen("dog", x=3.9, y=0), origin) == set()  # 1.9 / 3.9
    for x, y in ((4, 0), (-4, 0), (0, 4), (0, -4)):
        assert geneval.relations(seen("dog", x=x, y=y), origin) == set()  # exactly a half is not beyond it
    # Widths and heights shrink their own axis.
    wide = seen("dog", x=30, y=-30, w=200, h=10)
    assert geneval.relations(wide, origin) == {"above"}
    # On the diagonal both hold: 38 / 56.6 = 0.67.
    assert geneval.relations(seen("dog", x=40, y=-40), origin) == {"right of", "above"}


boxes = st.builds(
    lambda x, y, w, h: seen("dog", x=x, y=y, w=w, h=h),
    *[st.floats(-100, 100), st.floats(-100, 100), st.floats(0.5, 80), st.floats(0.5, 80)],
)


@given(boxes, boxes)
def test_relations_turn_round_with_their_objects(a: Detection, b: Detection) -> None:
    assert geneval.relations(b, a) == {world.OPPOSITE[side] for side in geneval.relations(a, b)}


def test_what_could_not_be_drawn_counts_as_wrong() -> None:
    prompts = [asks("single_object", DOG), asks("colors", {**DOG, "color": "red"})]
    judge = HandMade([seen("dog")], ["red"])
    verdicts = geneval.evaluate(judge, prompts, [[BLANK, None], [BLANK, BLANK]])
    assert [verdict.reasons for verdict in verdicts] == [(), ("no picture",), (), ()]
    assert geneval.by_task(verdicts) == {"single_object": [[1.0, 0.0]], "colors": [[1.0, 1.0]]}


# ------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_read_from_genevals_file(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],'
        ' "prompt": "a photo of two clocks"}\n'
        '{"tag": "position", "include": [{"class": "bear", "count": 1}, {"class": "dog", "count": 1, "position":'
        ' ["right of", 0]}], "prompt": "a photo of a dog right of a bear"}\n\n'
    )
    counting, position = load_prompts(path)
    assert (counting.exclude[0].label, counting.exclude[0].count) == ("clock", 3)
    assert position.include[1].position == ("right of", 0)
    assert [prompt.metadata() for prompt in (counting, position)] == [
        {"exclude": [], **json.loads(line)} for line in path.read_text().splitlines() if line
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"tag": "flavour", "include": [{"class": "dog", "count": 1}], "prompt": "x"}', "tag"),
        ('{"tag": "colors", "include": [{"class": "dog", "count": 1, "colour": "red"}], "prompt": "x"}', "colour"),
        (
            '{"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}], "prompt": "x"}',
            "0",
        ),
        ('{"tag": "colors", "include": [], "prompt": "x"}', "include"),
    ],
)
def test_an_unusable_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}\n' + line)
    with pytest.raises(EvaluationError, match="line 2") as caught:
        load_prompts(path)
    assert said in str(caught.value)


def test_no_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError):
        load_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError):
        load_prompts(tmp_path / "empty.jsonl")


KIND_OF = dict(zip(TASKS, ("place", "pair", "count", "colour", "relation", "attributes"), strict=True))


def test_shape_prompts_ask_for_held_out_combinations() -> None:
    for count in (12, 24):
        prompts = shape_prompts(count)
        assert len({prompt.prompt for prompt in prompts}) == len(prompts)
        asked = set()
        for prompt in prompts:
            held = [fact for fact in world.facts(world.parse(prompt.prompt)) if fact in world.held_out()]
            assert len(held) == 1, (prompt.prompt, held)  # one piece of news a prompt, or a failure would say little
            assert KIND_OF[prompt.tag] == held[0][0]
            asked.add(held[0])
        assert asked == world.held_out()
    for task in TASKS:
        assert sum(prompt.tag == task for prompt in shape_prompts()) == (8 if task == "single_object" else 12)
        assert sum(prompt.tag == task for prompt in shape_prompts(2)) == 2


def test_shape_prompts_check_what_they_say() -> None:
    for prompt in shape_prompts(24):
        said = world.parse(prompt.prompt)
        wanted = {required.label: required for required in prompt.include}
        assert {label: required.count for label, required in wanted.items()} == {n.shape: n.count for n in said.nouns}
        for noun in said.nouns:
            assert wanted[noun.shape].color in (None, noun.colour)
        if prompt.tag == "position":
            subject, target = said.nouns
            assert prompt.include[0].label == target.shape
            assert wanted[subject.shape].position == (said.relation, 0)
        assert (prompt.tag in ("colors", "color_attr")) == all(required.color for required in prompt.include)
        excluded = {required.label: required.count for required in prompt.exclude}
        (first, *_) = said.nouns
        if prompt.tag == "counting":
            assert excluded == {first.shape: first.count + 1}
        elif prompt.tag == "single_object":
            assert excluded == {**dict.fromkeys(world.SHAPES, 1), first.shape: 2}
        else:
            assert not excluded


# ------------------------------------------------------------------------------------------------- what the score means


JUDGE = ShapeJudge()


def jpeg(image: Image) -> Image:
    buffer = io.BytesIO()
    PilImage.fromarray(image).save(buffer, "JPEG", quality=90, subsampling=0)
    return np.asarray(PilImage.open(buffer))


def overall(images: Sequence[Sequence[Image]], prompts: Sequence[Prompt], judge: Judge = JUDGE) -> float:
    scores = geneval.by_task(geneval.evaluate(judge, prompts, images))
    assert list(scores) == list(TASKS)
    return float(np.mean([np.mean(task) for task in scores.values()]))


def true_renders(prompts: Sequence[Prompt], size: int) -> list[list[Image]]:
    return [[correct_picture(prompt.prompt, seed, size) for seed in range(4)] for prompt in prompts]


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("through", [np.copy, jpeg])
def test_true_renders_score_high(size: int, through: Callable[[Image], Image]) -> None:
    prompts = shape_prompts()
    images = [[through(image) for image in pictures] for pictures in true_renders(prompts, size)]
    assert overall(images, prompts) >= 0.98


@dataclass
class Remembering:
    """The shape judge, looking at each picture once."""

    seen: dict[int, list[Detection]] = field(default_factory=dict)
    name: str = "remembering"

    def detect(self, image_HWC: Image) -> Sequence[Detection]:
        if id(image_HWC) not in self.seen:
            self.seen[id(image_HWC)] = JUDGE.detect(image_HWC)
        return self.seen[id(image_HWC)]

    def colour(self, image_HWC: Image, detection: Detection) -> str:
        return JUDGE.colour(image_HWC, detection)


def shuffles(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Orders in which no prompt keeps its place: at random, within each task, reversed, and shifted."""
    count = len(prompts)
    for seed in range(3):
        cycle = random.Random(seed).sample(range(count), count)
        yield [following for _, following in sorted(zip(cycle, cycle[1:] + cycle[:1], strict=True))]
    groups = [[k for k, prompt in enumerate(prompts) if prompt.tag == task] for task in TASKS]
    yield [group[(k + 5) % len(group)] for group in groups for k in range(len(group))]
    yield list(range(count))[::-1]
    yield from ([(k + shift) % count for k in range(count)] for shift in (1, 7, 12, 36))


@pytest.mark.parametrize("size", [16, 32])
def test_renders_of_shuffled_prompts_score_low(size: int) -> None:
    prompts = shape_prompts(12)
    images = [[correct_picture(prompt.prompt, seed, size) for seed in range(2)] for prompt in prompts]
    judge = Remembering()
    for order in shuffles(prompts):
        assert sorted(order) == list(range(len(prompts)))
        assert overall([images[k] for k in order], prompts, judge) <= 0.15


def patches(rng: np.random.Generator, size: int) -> Image:
    """Plain patches of random colours, as a network that has learnt nothing may draw them."""
    coarse = rng.integers(0, 256, (4, 4, 3)).repeat(size // 4, axis=0).repeat(size // 4, axis=1)
    return np.clip(coarse + rng.normal(0, 10, coarse.shape), 0, 255).astype(np.uint8)


def blobs(rng: np.random.Generator, size: int) -> Image:
    """Smooth random colours."""
    coarse = PilImage.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), PilImage.Resampling.BICUBIC))


def noise(rng: np.random.Generator, size: int) -> Image:
    return np.clip(rng.normal(127, 127, (size, size, 3)), 0, 255).astype(np.uint8)


def grey(rng: np.random.Generator, size: int) -> Image:
    return np.clip(rng.normal(127, 8, (size, size, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("draw", [patches, blobs, noise, grey])
def test_pictures_of_nothing_score_low(size: int, draw: Callable[[np.random.Generator, int], Image]) -> None:
    prompts, rng = shape_prompts(), np.random.default_rng(0)
    assert overall([[draw(rng, size)] for _ in prompts], prompts) <= 0.02

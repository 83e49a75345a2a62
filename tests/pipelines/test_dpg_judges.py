"""Judges that answer questions: the shape world's, small random Qwen models through the real loading code, a server."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from PIL import Image as Pillow

from data_prep.shapes import world
from infra.config import parse
from infra.errors import CheckpointError, PixnerdError
from pipelines.evaluation.answering import EndpointAnswers, Unanswered, VlmAnswers
from pipelines.evaluation.asking import load
from pipelines.evaluation.dpg import by_item, score
from pipelines.evaluation.dpg_shapes import ShapeAnswerer, shape_questions
from pipelines.evaluation.judges import Image
from pipelines.evaluation.vqa import VlmAnswerer
from tests.data_prep.small_scorers import build_vlm, said, serve
from tests.drawing import correct_picture

# ------------------------------------------------------------------------------------------------- the shape world


def answers(picture: Image, *texts: str) -> list[Any]:
    return ShapeAnswerer().answers([(picture, texts)])[0]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_right_pictures_are_right_in_every_respect(size: int):
    questions = shape_questions(12)
    of_items = by_item(questions)
    said = {
        item: {
            seed: dict(
                zip(
                    asked,
                    answers(correct_picture(_prompt(asked), seed, size), *(q.text for q in asked.values())),
                    strict=True,
                )
            )
            for seed in range(2)
        }
        for item, asked in of_items.items()
    }
    scores = score(questions, said, "fixed")
    assert scores.overall == 100 and scores.coverage.scored == len(of_items) == 62


def _prompt(asked: Any) -> str:
    prompt: str = next(iter(asked.values())).prompt
    return prompt


def test_what_a_picture_does_not_show_is_answered_with_no():
    picture = correct_picture("a large red circle on the left", 0, 64)
    wrong = (
        "Is there a square?",
        "Are there two circles?",
        "Is the circle blue?",
        "Is the circle small?",
        "Is the circle in the middle?",
        "Is the circle on the right?",
        "Is the circle left of the square?",
        "Is the square red?",
    )
    assert answers(picture, *wrong) == ["no"] * len(wrong)
    dark = np.where((picture == 255).all(-1, keepdims=True), 40, picture).astype(np.uint8)
    assert answers(dark, "Is the background white?") == ["no"]
    three = correct_picture("three red circles", 0, 64)
    counted = answers(three, "Are there two circles?", "Are there three circles?", "Are there four circles?")
    assert counted == ["no", "yes", "no"]
    two = correct_picture("a red circle left of a blue square", 0, 64)
    assert answers(two, "Is the circle right of the square?", "Is the square right of the circle?") == ["no", "yes"]


def test_questions_that_it_does_not_know_and_pictures_that_it_cannot_read_have_a_cause():
    picture = correct_picture("a red circle", 0, 64)
    known, unknown = answers(picture, "Is there a circle?", "Is there a dog?")
    assert known == "yes" and isinstance(unknown, Unanswered)
    (oblong,) = answers(picture[:40], "Is there a circle?")
    assert oblong == Unanswered("the shape world is square")


def test_the_set_is_held_out_and_its_graph_leads_from_things_to_what_is_said_of_them():
    questions = shape_questions(3)
    assert questions == shape_questions(3)
    for asked in by_item(questions).values():
        assert world.is_held_out(world.parse(_prompt(asked)))
        things = {number for number, question in asked.items() if question.category == "entity - whole"}
        for question in asked.values():
            assert set(question.parents) <= things - {question.number}
            assert bool(question.parents) == question.category.startswith(("attribute", "other", "relation"))
    assert {question.category.split(" - ")[0] for question in questions} == {
        "entity", "attribute", "other", "relation", "global"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- Qwen-VL

TEXTS = ["Is there a dog?", "Is it red?", "Is the dog to the left of the other dog?", "No?", "Is there a dog on a mat?"]


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    build_vlm(folder, request.param)
    return folder


def settings(folder: Path, **changes: Any) -> VlmAnswers:
    return parse(VlmAnswers, {"kind": "vlm", "model": str(folder), "dtype": "float32", "batch": 2} | changes)


def picture(seed: int, height: int = 64, width: int = 64) -> Image:
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((height // 4, width // 4, 1), np.uint8))


@torch.inference_mode()
def one_by_one(judge: VlmAnswerer, image: Image, text: str) -> float:
    """The whole prompt, image included, through the whole network."""
    prompt = f"{judge.before}{text}{judge.after}"
    inputs = judge.processor(text=[prompt], images=[Pillow.fromarray(image)], return_tensors="pt")
    logits_V = judge.model(**inputs).logits[0, -1]
    return float(logits_V[judge.yes].logsumexp(0) - logits_V[judge.no].logsumexp(0))


def test_an_image_encoded_once_gives_the_logits_of_one_by_one(vlm: Path):
    judge = VlmAnswerer(settings(vlm), "cpu")
    seen = []
    for seed, shape in enumerate([(64, 64), (32, 96), (64, 64)]):
        image = picture(seed, *shape)
        shared = judge.margins(Pillow.fromarray(image), TEXTS)
        expected = torch.tensor([one_by_one(judge, image, text) for text in TEXTS])
        torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-4)
        seen.append(shared)
    assert (seen[0] - seen[2]).abs().min() > 1e-2, "pictures matter"
    assert seen[0].std() > 1e-2, "questions matter"


def test_the_likelier_word_and_the_said_word(vlm: Path):
    judge = VlmAnswerer(settings(vlm), "cpu")
    pictures = [picture(seed) for seed in range(4)]
    words = judge.answers([(image, TEXTS) for image in pictures])
    for image, of_image in zip(pictures, words, strict=True):
        margins = [one_by_one(judge, image, f"{text} {judge.settings.instruction}") for text in TEXTS]
        assert of_image == ["yes" if margin > 0 else "no" for margin in margins]
    judge.yes, judge.no = judge.no, judge.yes
    (swapped,) = judge.answers([(pictures[0], TEXTS)])
    assert swapped == ["no" if word == "yes" else "yes" for word in words[0]]
    speaker = VlmAnswerer(settings(vlm, answer="generated"), "cpu")
    (spoken,) = speaker.answers([(pictures[0], TEXTS)])
    assert len(spoken) == len(TEXTS) and all(isinstance(word, str) for word in spoken)
    assert spoken == VlmAnswerer(settings(vlm, answer="generated", batch=1), "cpu").answers([(pictures[0], TEXTS)])[0]
    assert settings(vlm).name == "model (likelier)" and settings(vlm, answer="generated").name == "model (generated)"


def test_a_network_that_raises_or_says_nothing_of_use_leaves_null(vlm: Path, monkeypatch: pytest.MonkeyPatch):
    judge = VlmAnswerer(settings(vlm), "cpu")
    broken = torch.full((len(TEXTS),), float("nan"))
    monkeypatch.setattr(judge, "margins", lambda *_: broken)
    assert judge.answers([(picture(0), TEXTS)]) == [[Unanswered("NaN")] * len(TEXTS)]

    def raises(*_: Any) -> Any:
        raise RuntimeError("the network is broken\nand more")

    monkeypatch.setattr(judge, "margins", raises)
    assert judge.answers([(picture(0), TEXTS)]) == [[Unanswered("the network is broken")] * len(TEXTS)]

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(judge, "margins", full)
    with pytest.raises(PixnerdError, match="too little memory"):
        judge.answers([(picture(0), TEXTS)])


def test_a_template_with_the_image_behind_the_question_is_refused(vlm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.evaluation.vqa.chat", lambda processor, text: f"{text}<|image_pad|>"[::-1])
    with pytest.raises(CheckpointError, match="chat template"):
        VlmAnswerer(settings(vlm), "cpu")


# ------------------------------------------------------------------------------------------------- a server


def test_a_server_is_asked_every_question_and_its_words_are_kept_as_they_are():
    asked: list[str] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        asked.append(text["text"])
        if "dog" in text["text"]:
            return said("no", status=400)
        return said("Yes." if "red" in text["text"] else "yes")

    with serve(handler) as url:
        plain = {
            "kind": "endpoint",
            "url": url,
            "model": "a/vlm",
            "retries": 0,
            "tolerated": 1.0,
            "instruction": "Say.",
        }
        server = parse(EndpointAnswers, plain)
        words = load(server, "cpu").answers([(picture(0), ["Is it red?", "Is it?", "Is it a dog?"])] * 2)
    assert words == [["Yes.", "yes", Unanswered("refused")]] * 2
    assert sorted(set(asked)) == ["Is it a dog? Say.", "Is it red? Say.", "Is it? Say."]
    assert server.name == "a/vlm (endpoint)"


def test_a_broken_server_is_an_error_and_not_a_score():
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return said("", status=500)

    with serve(handler) as url:
        plain = {"kind": "endpoint", "url": url, "model": "a/vlm", "retries": 0, "backoff": 0.0}
        with pytest.raises(PixnerdError, match="gave no answer"):
            load(parse(EndpointAnswers, plain), "cpu").answers([(picture(0), TEXTS)])


def test_the_order_of_pictures_is_kept():
    rng = random.Random(0)
    phrases = [rng.choice(["a red circle", "a blue square"]) for _ in range(6)]
    asked = [(correct_picture(phrase, 0, 32), ["Is there a circle?"]) for phrase in phrases]
    assert ShapeAnswerer().answers(asked) == [["yes" if "circle" in phrase else "no"] for phrase in phrases]

"""Judges that answer questions about pictures, and their settings.

shapes     `dpg_shapes`: the shape world's, in closed form
vlm        `vqa`: a vision-language model in this process
endpoint   a server that speaks OpenAI's protocol
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field

from data_prep.scores import Failure
from data_prep.scores.settings import Ask, Server, Vlm, Weighed
from pipelines.evaluation.judges import Image
from pipelines.evaluation.tars import png_of

LONGEST = 200  # letters of an answer that are kept


class Unanswered(NamedTuple):
    cause: str


Answer = str | Unanswered


class Answerer(Protocol):
    def answers(self, asked: Sequence[tuple[Image, Sequence[str]]]) -> list[list[Answer]]:
        """The judge's word on every question about each picture."""


class ShapeAnswers(Weighed):
    """The shape world's judge: geometry in closed form, no network."""

    kind: Literal["shapes"] = "shapes"

    @property
    def name(self) -> str:
        return self.kind


class VlmAnswers(Vlm):
    """Answers by a model of transformers' format, Qwen2.5-VL or Qwen3-VL above all."""

    kind: Literal["vlm"] = "vlm"
    answer: Literal["likelier", "generated"] = Field(
        "likelier",
        description="likelier: yes or no, by one forward pass; generated: the words that the model says, of which "
        "exactly `yes` counts",
    )
    instruction: str = Field("Answer yes or no, in lower case.", description="what stands behind every question")
    batch: int = Field(16, ge=1, description="questions at once")

    @property
    def name(self) -> str:
        """The model's name, and how it is asked: the word that it would say is another judge than the likelier one."""
        folder = self.local().get("model")
        return f"{self.model if folder is None else folder.name} ({self.answer})"


class EndpointAnswers(Server):
    """Answers by a server that speaks OpenAI's protocol: the words that its model says, of which `yes` counts."""

    kind: Literal["endpoint"] = "endpoint"
    instruction: str = Field("Answer yes or no, in lower case.", description="what stands behind every question")
    max_tokens: int = Field(8, ge=1, le=8192, description="of an answer; more, if the model thinks aloud")

    @property
    def name(self) -> str:
        return f"{self.model} (endpoint)"


AnyJudge = Annotated[ShapeAnswers | VlmAnswers | EndpointAnswers, Field(discriminator="kind")]


class EndpointAnswerer:
    """Asks all questions about some pictures at once; a question that the server did not answer has its cause."""

    def __init__(self, settings: EndpointAnswers) -> None:
        from data_prep.scores.endpoint import Client

        self.settings, self.client = settings, Client(settings)

    def answers(self, asked: Sequence[tuple[Image, Sequence[str]]]) -> list[list[Answer]]:
        replies = self.client.replies((png_of(image), [self._ask(text) for text in texts]) for image, texts in asked)
        return [[_answer(reply) for reply in of_image] for of_image in replies]

    def _ask(self, text: str) -> Ask:
        return Ask(kind="question", prompt=f"{text} {self.settings.instruction}", max_tokens=self.settings.max_tokens)


def _answer(reply: str | Failure) -> Answer:
    return Unanswered(reply.value) if isinstance(reply, Failure) else reply[:LONGEST]

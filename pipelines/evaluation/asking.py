"""Asks a judge about a chunk's pictures: what an actor does, without the network that drew them. All answers are kept.

A table of answers has a row for each picture, in the form of GenEval's verdicts, with the raw answers beside it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import digest
from infra.errors import EvaluationError
from infra.records import DataObject, get_data
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import dpg
from pipelines.evaluation.answering import (
    Answer,
    Answerer,
    AnyJudge,
    EndpointAnswerer,
    EndpointAnswers,
    Unanswered,
    VlmAnswers,
)
from pipelines.evaluation.chunks import Chunk, Made, Maker
from pipelines.evaluation.dpg_shapes import ShapeAnswerer
from pipelines.evaluation.tars import ToJudge, place

_ANSWERS = "answers"
TASK = "dpg"
_ANSWER = pa.struct([("question", pa.int64()), ("answer", pa.string())])  # null where the judge raised
_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("prompt", pa.int64()),
        ("text", pa.string()),
        ("image", pa.int64()),
        ("correct", pa.bool_()),
        ("reasons", pa.string()),
        ("score", pa.float64()),  # the share of its questions that are met, by the mode `fixed`
        ("item", pa.string()),
        ("failure", pa.string()),
        ("answers", pa.list_(_ANSWER)),
    ]
)


def load(settings: AnyJudge, device: str) -> Answerer:
    if isinstance(settings, EndpointAnswers):
        return EndpointAnswerer(settings)
    if isinstance(settings, VlmAnswers):
        from pipelines.evaluation.vqa import VlmAnswerer

        return VlmAnswerer(settings, device)
    return ShapeAnswerer()


class Item(NamedTuple):
    name: str
    prompt: str
    asked: dpg.Questions


class Said(NamedTuple):
    """What a judge said about one picture, and why it said less than was asked."""

    number: int  # of the item
    image: int
    answers: Mapping[int, str | None]
    failure: str | None


class Asking(Maker[ToJudge]):
    noun = "batches of answers"

    def __init__(self, store: Store, judge: AnyJudge, items: Sequence[Item]) -> None:
        self.store, self.judge, self.items = store, judge, items
        self.identity = digest(judge.identity())

    def load(self, device: str) -> None:
        if digest(self.judge.identity()) != self.identity:
            raise EvaluationError("the judge's weights differ between machines", remedy="give all nodes the same files")
        self.answerer = load(self.judge, device)

    def pictures(self, item: ToJudge) -> list[str]:
        return item.there

    def make(self, item: ToJudge) -> Made:
        failed, there = {}, []
        for name, picture in item.read(self.store):
            if isinstance(picture, str):
                failed[name] = picture
            else:
                there.append((name, picture))
        texts = [[question.text for question in self._asked(name).values()] for name, _ in there]
        pictures = [picture for _, picture in there]
        answers = self.answerer.answers(list(zip(pictures, texts, strict=True)))
        said = [self._said(name, of_picture) for (name, _), of_picture in zip(there, answers, strict=True)]
        return Made({f"{_ANSWERS}.parquet": parquet_bytes(table_of(said, self.items))}, failed)

    def _asked(self, name: str) -> dpg.Questions:
        return self.items[place(name)[0]].asked

    def _said(self, name: str, answers: Sequence[Answer]) -> Said:
        causes = [f"the judge failed: {answer.cause}" for answer in answers if isinstance(answer, Unanswered)]
        words = [None if isinstance(answer, Unanswered) else answer for answer in answers]
        by_question = dict(zip(self._asked(name), words, strict=True))
        return Said(*place(name), by_question, causes[0] if causes else None)


def nothing_said(items: Sequence[Item], number: int, image: int, cause: str) -> Said:
    """The entry of a picture that could not be made, or that could not be judged at all."""
    return Said(number, image, dict.fromkeys(items[number].asked), cause)


def table_of(said: Sequence[Said], items: Sequence[Item]) -> pa.Table:
    rows = []
    for of_picture in said:
        item, failure = items[of_picture.number], of_picture.failure
        wrong = list(dpg.unmet(item.asked, of_picture.answers))
        rows.append(
            {
                "task": TASK,
                "prompt": of_picture.number,
                "text": item.prompt,
                "image": of_picture.image,
                "correct": not wrong,
                "reasons": f"no verdict: {failure}" if failure else "; ".join(wrong),
                "score": dpg.met(item.asked, of_picture.answers),
                "item": item.name,
                "failure": failure,
                "answers": [{"question": n, "answer": answer} for n, answer in of_picture.answers.items()],
            }
        )
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def said_of(store: Store, chunk: Chunk) -> list[Said]:
    return [_said(row) for row in _rows(get_data(store, chunk.data[_ANSWERS]))] if _ANSWERS in chunk.data else []


def answers_in(store: Store, details: DataObject) -> dpg.Answers:
    """The answers that a report keeps, as they are scored."""
    return _answers(_rows(get_data(store, details)))


def read_answers(path: Path) -> dpg.Answers:
    """The same from a copy of that table."""
    try:
        return _answers(_rows(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise EvaluationError(
            f"{path} is no table of answers ({type(error).__name__})", remedy="name the `details` of a report of DPG"
        ) from None


def _answers(rows: Sequence[Mapping[str, Any]]) -> dpg.Answers:
    answers: dict[str, dict[int, Mapping[int, str | None]]] = {}
    for row in rows:
        answers.setdefault(row["item"], {})[row["image"]] = _said(row).answers
    return answers


def _rows(parquet: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(parquet)).to_pylist()
    return rows


def _said(row: Mapping[str, Any]) -> Said:
    answers = {answer["question"]: answer["answer"] for answer in row["answers"]}
    return Said(row["prompt"], row["image"], answers, row["failure"])

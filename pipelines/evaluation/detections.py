"""What a judge has seen in pictures, as a table, and verdicts from such a table alone: without pictures and networks.

A row is a detection. `item` is the number of the prompt and `image` that of its picture, both from 0; `class`, `score`
and `box` (left, top, right, bottom, in pixels) tell what was found, and `color` is null where it was not asked for. A
picture in which nothing was found has one row without a class.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from infra.causes import first_line
from infra.errors import EvaluationError
from infra.records import DataObject, Interval, get_data
from infra.store import Store
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.judges import NO_MASK, Detection, Image
from pipelines.evaluation.prompts import Prompt
from pipelines.evaluation.sets import PromptSettings, read_prompts
from pipelines.evaluation.statistics import OVERALL, intervals

COLUMNS = "item, image, class, score, box ([left, top, right, bottom]) and color (null where it is not known)"
MOST_IMAGES = 10_000  # of a prompt: a larger number in a file is a slip

_SCHEMA = pa.schema(
    [
        ("item", pa.int64()),
        ("image", pa.int64()),
        ("class", pa.string()),
        ("score", pa.float32()),
        ("box", pa.list_(pa.float32(), 4)),
        ("color", pa.string()),
    ]
)
_NOTHING: Image = np.zeros((0, 0, 3), np.uint8)


class Kept(NamedTuple):
    """A detection and its colour."""

    detection: Detection
    colour: str | None


Pictures = Mapping[tuple[int, int], Sequence[Kept]]  # (number of the prompt, of its picture) -> what is in it


@dataclass(frozen=True)
class Repeated:
    """A judge that repeats what was seen in a picture."""

    kept: Sequence[Kept]
    name: str = "repeated"

    def detect(self, image_HWC: Image) -> list[Detection]:
        return [detection for detection, _ in self.kept]

    def colour(self, image_HWC: Image, detection: Detection) -> str:
        return next(colour for seen, colour in self.kept if seen is detection) or ""


def verdict(prompt: Prompt, number: int, image: int, kept: Sequence[Kept]) -> protocol.Verdict:
    reasons = protocol.judge_picture(Repeated(kept), prompt, _NOTHING)
    return protocol.Verdict(prompt.tag, number, prompt.prompt, image, tuple(reasons))


def table_of(pictures: Pictures) -> pa.Table:
    rows = []
    for (item, image), kept in pictures.items():
        rows += [
            {"item": item, "image": image, "class": d.label, "score": d.score, "box": d.box, "color": colour}
            for d, colour in kept
        ] or [{"item": item, "image": image}]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    item: int = Field(ge=0)
    image: int = Field(0, ge=0, lt=MOST_IMAGES)
    label: str | None = Field(None, validation_alias=AliasChoices("class", "label"))
    score: float | None = None
    box: tuple[float, float, float, float] | None = None
    color: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Row:
        if self.label is not None and (self.score is None or self.box is None):
            raise ValueError("a class needs a score and a box")
        return self


def pictures_of(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[tuple[int, int], list[Kept]]:
    """The pictures of rows, each of which comes with its place in the file, for errors."""
    pictures: dict[tuple[int, int], list[Kept]] = {}
    for place, data in rows:
        try:
            row = _Row.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            raise EvaluationError(
                f"{place}: {'.'.join(map(str, problem['loc']))} {problem['msg']}", remedy=f"a row has {COLUMNS}"
            ) from None
        kept = pictures.setdefault((row.item, row.image), [])
        if row.label is not None and row.score is not None and row.box is not None:
            kept.append(Kept(Detection(row.label, row.score, row.box, NO_MASK), row.color))
    return pictures


def read(path: Path) -> dict[tuple[int, int], list[Kept]]:
    """The pictures of a JSONL or Parquet file."""
    try:
        pictures = pictures_of(_parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path))
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise EvaluationError(
            f"the detections in {path} cannot be read ({first_line(error)})",
            remedy=f"name a JSONL or Parquet file with {COLUMNS}",
        ) from None
    if not pictures:
        raise EvaluationError(f"{path} holds no detections", remedy=f"a row has {COLUMNS}")
    return pictures


def of_table(store: Store, table: DataObject) -> dict[tuple[int, int], list[Kept]]:
    """The pictures of a table that `table_of` made."""
    return pictures_of(_rows(io.BytesIO(get_data(store, table)), table.key))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return _rows(io.BytesIO(path.read_bytes()), str(path))


def _rows(file: io.BytesIO, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(pq.read_table(file).to_pylist(), 1):
        yield f"{name}, row {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except (ValueError, RecursionError):
                data = None
            if not isinstance(data, dict):
                raise EvaluationError(f"{path}, line {number} is no JSON object", remedy=f"a line has {COLUMNS}")
            yield f"{path}, line {number}", data


def verdicts(prompts: Sequence[Prompt], pictures: Pictures, images: int | None = None) -> list[protocol.Verdict]:
    """The verdict on each picture of each prompt; in one that is not named nothing was found.

    `images` is how many pictures a prompt has; by default as many as the highest number in `pictures` tells.
    """
    item, image = max(item for item, _ in pictures), max(image for _, image in pictures)
    if item >= len(prompts):
        raise EvaluationError(
            f"there are detections of item {item}, but {len(prompts)} prompts", remedy="name the file of their prompts"
        )
    if images is not None and image >= images:
        raise EvaluationError(
            f"there are detections of image {image}, but {images} pictures a prompt", remedy="raise `images`"
        )
    return [
        verdict(prompt, number, of_prompt, pictures.get((number, of_prompt), ()))
        for number, prompt in enumerate(prompts)
        for of_prompt in range(images or image + 1)
    ]


class ScoringSettings(PromptSettings):
    images: int | None = Field(None, ge=1, description="pictures a prompt; none: as many as the file tells")
    seed: int = Field(0, description="of the bootstrap")


class Summary(NamedTuple):
    verdicts: list[protocol.Verdict]
    scores: dict[str, Interval]  # a task's name, or "overall" -> its score
    unseen: int  # prompts of which no picture is named

    def shown(self) -> dict[str, Any]:
        """As JSON values."""
        items: dict[str, list[float]] = {}
        for one in self.verdicts:
            items.setdefault(str(one.number), []).append(float(one.correct))
        return {
            "protocol": "geneval",
            "overall": self.scores[OVERALL].value,
            "tasks": {task: score.value for task, score in self.scores.items() if task != OVERALL},
            "scores": {f"geneval/{name}": score.model_dump(mode="json") for name, score in self.scores.items()},
            "items": {item: sum(right) / len(right) for item, right in items.items()},
            "images": len(self.verdicts),
            "coverage": {"items": len(items), "scored": len(items) - self.unseen, "missing": self.unseen},
            "verdicts": [
                {
                    "item": one.number,
                    "image": one.image,
                    "tag": one.task,
                    "correct": one.correct,
                    "reason": "\n".join(one.reasons),
                }
                for one in self.verdicts
            ],
        }


def summary(pictures: Pictures, settings: ScoringSettings) -> Summary:
    prompts = read_prompts(settings)
    judged = verdicts(prompts, pictures, settings.images)
    unseen = set(range(len(prompts))) - {item for item, _ in pictures}
    return Summary(judged, intervals(protocol.by_task(judged), seed=settings.seed), len(unseen))

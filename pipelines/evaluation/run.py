"""A GenEval run: draw the pictures, judge them, compute scores, and write the report's record last."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import Field

from infra import layout
from infra.config import Settings, digest
from infra.records import CheckpointRecord, DataObject, EvalReport, Record, put_data, read_record, recorded
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.generate import Order, Resources, Show, generate, read_pictures
from pipelines.evaluation.judges import Image, Judge, ShapeJudge
from pipelines.evaluation.prompts import Prompt, load_prompts, shape_prompts
from pipelines.evaluation.statistics import intervals
from training.sampling import SampleSettings


class GenevalSettings(Settings):
    prompts: str = Field("shapes", description="`shapes`: the shape world's own; or a JSONL file of GenEval metadata")
    per_task: int = Field(12, ge=2, description="prompts a task of the shape world's set")
    images: int = Field(4, ge=1, description="pictures a prompt, from seeds 0, 1, ...")
    judge: Literal["shapes"] = "shapes"
    sampling: SampleSettings = SampleSettings()
    seed: int = Field(0, description="of the bootstrap")


def prompts_digest(settings: GenevalSettings) -> str:
    """A digest of the prompts themselves, as a file may change while its name does not."""
    return digest([prompt.metadata() for prompt in _prompts(settings)])


def _prompts(settings: GenevalSettings) -> list[Prompt]:
    return shape_prompts(settings.per_task) if settings.prompts == "shapes" else load_prompts(Path(settings.prompts))


class Pictures(Record):
    """The record of what was drawn; with it, an interrupted run is judged without being drawn again."""

    prompts: list[str]
    images: int
    tars: list[DataObject]


def geneval(
    store: Store,
    stage: str,
    checkpoint: CheckpointRecord,
    settings: GenevalSettings,
    show: Show,
    resources: Resources = Resources(),
) -> EvalReport:
    """Evaluate a checkpoint by GenEval; pictures that an interrupted run drew are used again."""
    prompts = _prompts(settings)
    order = Order(store, layout.JUDGED.at(stage=stage), checkpoint, settings.images, settings.sampling, resources)
    drawn = _draw(order, layout.PICTURES.at(stage=stage), [prompt.prompt for prompt in prompts], show)
    judge: Judge = ShapeJudge()
    pictures = read_pictures(store, drawn.tars)
    verdicts = protocol.evaluate(
        judge, prompts, [[_pixels(pictures.get((p, i))) for i in range(settings.images)] for p in range(len(prompts))]
    )
    scores = intervals(protocol.by_task(verdicts), seed=settings.seed)
    report = EvalReport(
        protocol="geneval",
        judge=judge.name,
        prompts=prompts_digest(settings),
        checkpoint=checkpoint.digest(),
        images=len(verdicts),
        failed=len(verdicts) - len(pictures),
        scores={f"geneval/{task}": interval for task, interval in scores.items()},
        details=put_data(store, layout.VERDICTS.at(stage=stage), "verdicts.parquet", parquet_bytes(_table(verdicts))),
        pictures=drawn.tars,
    )
    return recorded(store, layout.REPORT.at(stage=stage), report)


def _draw(order: Order, key: str, prompts: list[str], show: Show) -> Pictures:
    if order.store.exists(key):
        return read_record(order.store, key, Pictures)
    drawn = Pictures(prompts=prompts, images=order.images, tars=generate(order, prompts, show))
    return recorded(order.store, key, drawn)


def _pixels(png: bytes | None) -> Image | None:
    import numpy as np
    from PIL import Image as Pillow

    return None if png is None else np.asarray(Pillow.open(io.BytesIO(png)).convert("RGB"))


def _table(verdicts: Sequence[protocol.Verdict]) -> pa.Table:
    columns = {
        "task": [v.task for v in verdicts],
        "prompt": [v.number for v in verdicts],
        "text": [v.prompt for v in verdicts],
        "image": [v.image for v in verdicts],
        "correct": [v.correct for v in verdicts],
        "reasons": ["; ".join(v.reasons) for v in verdicts],
    }
    return pa.table(columns)

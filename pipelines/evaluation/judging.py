"""Judges a chunk's pictures by GenEval: what an actor does, without the network that drew them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.causes import first_line
from infra.records import DataObject, get_data
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.chunks import Chunk, Made, Maker
from pipelines.evaluation.judges import Judge
from pipelines.evaluation.prompts import Prompt
from pipelines.evaluation.tars import ToJudge, place

_VERDICTS = "verdicts"
_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("prompt", pa.int64()),
        ("text", pa.string()),
        ("image", pa.int64()),
        ("correct", pa.bool_()),
        ("reasons", pa.string()),
    ]
)


class Judging(Maker[ToJudge]):
    noun = "batches of verdicts"

    def __init__(self, store: Store, judge: Judge, prompts: Sequence[Prompt]) -> None:
        self.store, self.judge, self.prompts = store, judge, prompts

    def load(self, device: str) -> None: ...

    def pictures(self, item: ToJudge) -> list[str]:
        return item.there

    def make(self, item: ToJudge) -> Made:
        verdicts, failed = [], {}
        for name, picture in item.read(self.store):
            number, image = place(name)
            if isinstance(picture, str):
                failed[name] = picture
                continue
            prompt = self.prompts[number]
            try:
                reasons = tuple(protocol.judge_picture(self.judge, prompt, picture))
            except (ValueError, RuntimeError, AssertionError) as error:
                failed[name] = f"the judge failed: {first_line(error)}"
                continue
            verdicts.append(protocol.Verdict(prompt.tag, number, prompt.prompt, image, reasons))
        return Made({f"{_VERDICTS}.parquet": parquet_bytes(table_of(verdicts))}, failed)


def table_of(verdicts: Sequence[protocol.Verdict]) -> pa.Table:
    columns = {
        "task": [v.task for v in verdicts],
        "prompt": [v.number for v in verdicts],
        "text": [v.prompt for v in verdicts],
        "image": [v.image for v in verdicts],
        "correct": [v.correct for v in verdicts],
        "reasons": ["; ".join(v.reasons) for v in verdicts],
    }
    return pa.table(columns, schema=_SCHEMA)


def verdicts_of(store: Store, chunk: Chunk) -> list[protocol.Verdict]:
    rows = verdict_rows(store, chunk.data[_VERDICTS]) if _VERDICTS in chunk.data else []
    return [
        protocol.Verdict(row["task"], row["prompt"], row["text"], row["image"], tuple(filter(None, [row["reasons"]])))
        for row in rows
    ]


def verdict_rows(store: Store, table: DataObject) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(get_data(store, table))).to_pylist()
    return rows

"""Judges a chunk's pictures by GenEval: what an actor does, without the network that drew them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.causes import first_line
from infra.records import DataObject, get_data
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import detections
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.chunks import Chunk, Made, Maker
from pipelines.evaluation.detections import Kept, verdict
from pipelines.evaluation.detector.loading import load
from pipelines.evaluation.detector.settings import JudgeSettings
from pipelines.evaluation.judges import NO_MASK, Image
from pipelines.evaluation.prompts import Prompt
from pipelines.evaluation.tars import ToJudge, place

_VERDICTS = "verdicts"
DETECTIONS = "detections"
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
    """Verdicts, and what was seen in each picture, from which verdicts can be made again."""

    noun = "batches of verdicts"

    def __init__(self, store: Store, judge: JudgeSettings, prompts: Sequence[Prompt], threads: int = 1) -> None:
        self.store, self.prompts, self.threads = store, prompts, threads
        self.settings = judge if judge == "shapes" else judge.located()

    def load(self, device: str) -> None:
        if self.settings != "shapes" and device == "cpu":
            import torch

            torch.set_num_threads(self.threads)
        self.judge = load(self.settings, device)

    def pictures(self, item: ToJudge) -> list[str]:
        return item.there

    def make(self, item: ToJudge) -> Made:
        seen, failed = dict[str, list[Kept]](), dict[str, str]()
        for batch in _batches(item.read(self.store), self.judge.batch, failed):
            seen |= self._seen(batch, failed)
        verdicts, pictures = [], {}
        for name, kept in seen.items():
            number, image = place(name)
            verdicts.append(verdict(self.prompts[number], number, image, kept))
            pictures[number, image] = kept
        files = {f"{_VERDICTS}.parquet": table_of(verdicts), f"{DETECTIONS}.parquet": detections.table_of(pictures)}
        return Made({name: parquet_bytes(table) for name, table in files.items()}, failed)

    def _seen(self, batch: dict[str, Image], failed: dict[str, str]) -> dict[str, list[Kept]]:
        """What is in some pictures; if the judge fails, each alone, so that only the guilty one is counted."""
        try:
            return self._look(batch)
        except (ValueError, RuntimeError, AssertionError) as error:
            if len(batch) == 1:
                failed[next(iter(batch))] = f"the judge failed: {first_line(error)}"
                return {}
        return {name: kept for one in batch.items() for name, kept in self._seen(dict([one]), failed).items()}

    def _look(self, batch: dict[str, Image]) -> dict[str, list[Kept]]:
        found = dict(zip(batch, self.judge.detections(list(batch.values())), strict=True))
        asked = [
            (batch[name], detection)
            for name, seen in found.items()
            for detection in protocol.coloured(self.prompts[place(name)[0]], seen)
        ]
        named = zip(asked, self.judge.colours(asked) if asked else [], strict=True)
        colours = {id(detection): colour for (_, detection), colour in named}
        return {
            name: [Kept(replace(detection, mask_HW=NO_MASK), colours.get(id(detection))) for detection in seen]
            for name, seen in found.items()
        }


def _batches(
    pictures: Iterable[tuple[str, Image | str]], size: int, failed: dict[str, str]
) -> Iterator[dict[str, Image]]:
    """The pictures by name, `size` at once; those that are no pictures are put into `failed` with the cause."""
    batch: dict[str, Image] = {}
    for name, picture in pictures:
        if isinstance(picture, str):
            failed[name] = picture
            continue
        batch[name] = picture
        if len(batch) == size:
            yield batch
            batch = {}
    if batch:
        yield batch


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

"""A finished workflow in a store, made by hand: every record and object that a page is made of, and nothing trained."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.shapes.corpus import kind_of
from data_prep.shapes.world import render, sample_scene
from infra.config import digest
from infra.records import (
    CheckpointRecord,
    DataObject,
    EvalReport,
    PrepareSummary,
    Record,
    ShardRecord,
    SizeSummary,
    SnapshotRecord,
    StageRecord,
    put_data,
    write_record,
)
from infra.shards import INDEX_SCHEMA, SELECTION_SCHEMA, TarWriter, parquet_bytes, sample_key, shard_key, shard_prefix
from infra.store import Store
from pipelines.evaluation import geneval
from pipelines.evaluation.judges import ShapeJudge
from pipelines.evaluation.prompts import Prompt, shape_prompts
from pipelines.evaluation.statistics import intervals
from tests.drawing import correct_picture

CAUSES = {"truncated": "truncated", "bomb": "too_many_pixels", "tiny": "too_small", "not_an_image": "unknown_format"}
VERSIONS = {"pixnerd": "0.1.0", "torch": "2.9.0", "ray": "2.50.0"}


@dataclass
class Made:
    """The records in their order; what they name can be found by the stage's name."""

    store: Store
    stages: list[StageRecord] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)

    def stage(
        self, name: str, kind: str, output: dict[str, Any], *, seconds: float = 1.5, settings: Any = None, **inputs: str
    ) -> None:
        works = {stage.stage: stage.digest_of_work for stage in self.stages}
        below = {setting.replace("_at_", "."): works[target] for setting, target in inputs.items()}
        self.stages.append(
            StageRecord(
                stage=name,
                kind=kind,
                digest_of_work=digest([kind, name, below]),
                inputs=below,
                settings=settings or {},
                output=output,
                versions=VERSIONS,
                started="2025-03-04T05:06:07+00:00",
                seconds=seconds,
            )
        )

    def put(self, name: str, record: Record) -> str:
        key = f"records/{name}.json"
        write_record(self.store, key, record)
        self.named[name] = record
        return key


def make(store: Store, *, files: int = 200, per_task: int = 2, images: int = 2, rows: int = 3) -> Made:
    """corpus -> prepare -> three snapshots -> encoders -> three training stages, each evaluated -> gate -> register."""
    made = Made(store)
    made.stage(
        "corpus", "corpus", {"folder": "/somewhere", "files": {"jpg": files}}, settings={"count": files, "seed": 0}
    )
    _prepare(made, files)
    for name, size in (("low_data", "16"), ("high_data", "32"), ("sft_data", "32")):
        _snapshot(made, name, size)
    made.stage("encoders", "encoders", {"text": {}, "vision": {}}, captions="high_data", seconds=3.0)
    before = None
    for number, (name, quality) in enumerate((("low", 0.35), ("high", 0.7), ("sft", 0.85))):
        train(made, name, before, rows=rows, size=16 if name == "low" else 32)
        evaluate(made, f"{name}_score", name, quality, per_task, images, size=16 if number == 0 else 32)
        before = name
    scores = [made.named[f"{name}_score"].scores["geneval/overall"].value for name in ("sft", "low")]
    verdicts = [
        {"score": "geneval/overall", "value": scores[0], "limit": "at least 0.100", "passed": True},
        {"score": "geneval/overall", "value": scores[0], "limit": f"above low_score's {scores[1]:.3f}", "passed": True},
    ]
    gate = {"scores_at_0": "sft_score", "scores_at_1": "low_score"}
    made.stage("gate", "gate", {"passed": True, "verdicts": verdicts}, seconds=0.1, **gate)
    output = {"model": "pixnerd-demo", "version": "3", "alias": "champion", "source": "/somewhere"}
    made.stage("register", "register", output, gate="gate", checkpoint="sft", scores="sft_score")
    return made


def _prepare(made: Made, files: int) -> None:
    sizes = {size: _shard(made, size, files) for size in ("16", "32")}
    summary = PrepareSummary(
        plan="plan",
        edition="edition",
        inputs=files,
        tried_again={},
        sizes={
            size: SizeSummary(shards=shard_prefix("plan", size), count=1, accepted=r.accepted, rejected=r.rejected)
            for size, r in sizes.items()
        },
        versions=[{"pillow": "12.0.0"}],
    )
    settings = {"sources": [{"kind": "table_folder", "name": "shapes", "keep": []}], "sizes": [16, 32]}
    output = summary.model_dump(mode="json")
    made.stage("prepare", "prepare", output, settings=settings, seconds=9.2, sources_at_0="corpus")


def _shard(made: Made, size: str, files: int) -> ShardRecord:
    rejected: Counter[str] = Counter()
    buffer, rows = io.BytesIO(), []
    tar = TarWriter(buffer)
    for number in range(files):
        kind = kind_of(number, 0)
        key = sample_key("shapes", f"captions.parquet#{number}")
        row = {"key": key, "source": "shapes", "licence": "", "origin": "", "row": number}
        row |= {"name": f"images/{number:06d}.jpg"}
        row |= {"accepted": kind not in CAUSES, "cause": CAUSES.get(kind), "captions": []}
        if row["accepted"]:
            scene = sample_scene(random.Random(f"0/{number}"))
            member = tar.add(f"{key}.jpg", _encoded(render(scene, int(size)), "JPEG"))
            row |= {"offset": member.offset, "length": member.length}
        else:
            rejected[CAUSES[kind]] += 1
        rows.append(row)
    tar.finish()
    record = ShardRecord(
        plan="plan",
        size=size,
        number=0,
        tar=put_data(made.store, f"data/{size}", "00000.tar", buffer.getvalue()),
        index=put_data(
            made.store,
            f"data/{size}",
            "00000.parquet",
            parquet_bytes(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)),
        ),
        accepted=files - rejected.total(),
        rejected=dict(rejected),
        versions={"pillow": "12.0.0"},
    )
    write_record(made.store, shard_key("plan", size, 0), record)
    made.named[f"rows-{size}"] = rows
    return record


def _snapshot(made: Made, name: str, size: str) -> None:
    accepted = [row for row in made.named[f"rows-{size}"] if row["accepted"]]
    unique = [row for row in accepted if kind_of(row["row"], 0) != "duplicate"]
    held_out = len(unique) // 50
    record = SnapshotRecord(
        shards=shard_prefix("plan", size),
        size=size,
        selection=_selection(made, f"{name}.parquet", unique[held_out:]),
        held_out=_selection(made, f"{name}-held-out.parquet", unique[:held_out]),
        by_shard=put_data(made.store, "data/snapshots", f"{name}-by-shard.parquet", parquet_bytes(pa.table({}))),
        rows=len(unique) - held_out,
        held_out_rows=held_out,
        counts=[("accepted", len(accepted)), ("not duplicate", len(unique)), ("has a caption of the mix", len(unique))],
        by_source={"shapes": [len(accepted), len(unique), len(unique)]},
        caption_shares={"caption": 1.0},
        forgotten=[],
    )
    output = {"record": made.put(name, record), "rows": record.rows, "counts": record.counts, "size": size}
    settings = {"size": int(size), "filter": "not duplicate", "name": name}
    made.stage(name, "snapshot", output, settings=settings, shards="prepare", seconds=0.6)


def _selection(made: Made, name: str, rows: list[dict[str, Any]]) -> DataObject:
    plain = {"tar": "a.tar", "offset": 0, "length": 1, "width": 1, "height": 1, "captions": [], "caption_weights": []}
    plain |= {"source": "shapes", "bucket": "1x1"}
    table = pa.Table.from_pylist([plain | {"key": row["key"]} for row in rows], schema=SELECTION_SCHEMA)
    return put_data(made.store, "data/snapshots", name, parquet_bytes(table))


def train(made: Made, name: str, before: str | None, *, rows: int, size: int) -> None:
    start = made.named[before].digest() if before else None
    record = CheckpointRecord(
        folder=f"training/{name}",
        files={},
        run=name,
        step=rows * 20,
        position=rows * 20 * 64,
        snapshot=made.named[f"{name}_data"].digest(),
        start_from=start,
        parameters=3_081_234,
        curve=put_data(
            made.store, "training", f"{name}.parquet", parquet_bytes(pa.Table.from_pylist(curve(name, rows)))
        ),
    )
    output = {
        "record": made.put(name, record),
        "parameters": 3_081_234,
        "images_seen": record.position,
        "image_size": size,
    }
    inputs = {"data": f"{name}_data", "encoders": "encoders"} | ({"start_from": before} if before else {})
    settings = {"preset": "tiny", "steps": rows * 20, "optim": {"lr": 0.001, "betas": [0.9, 0.95]}}
    made.stage(name, "train", output, settings=settings, seconds=61.0, **inputs)


def curve(name: str, rows: int) -> list[dict[str, float]]:
    rng, floor = random.Random(name), {"low": 0.30, "high": 0.16, "sft": 0.12}[name]
    found = []
    for k in range(1, rows + 1):
        loss = floor + 0.7 / (1 + k) * floor * 4 + rng.gauss(0, 0.004)
        row = {"step": 20 * k, "images": 20 * k * 64, "train/loss": loss, "perf/images_per_second": rng.gauss(280, 12)}
        row |= {"perf/data_wait": 0.012, "repa/cosine": 0.8 - 0.6 / (1 + k / 3), "repa/cosine_shuffled": 0.35}
        row |= {f"train/loss_t{t / 10:.1f}": loss * (1.9 - 0.18 * t) + rng.gauss(0, 0.006) for t in range(10)}
        found.append(row)
    return found


def evaluate(
    made: Made, name: str, checkpoint: str, quality: float, per_task: int, images: int, *, size: int = 16
) -> None:
    prompts = shape_prompts(per_task)
    rng = random.Random(name)
    drawn = [[_drawn(prompt, prompts, seed, quality, size, rng) for seed in range(images)] for prompt in prompts]
    verdicts = geneval.evaluate(ShapeJudge(), prompts, drawn)
    buffer = io.BytesIO()
    tar = TarWriter(buffer)
    for number, pictures in enumerate(drawn):
        for image, picture in enumerate(pictures):
            tar.add(f"{number:05d}-{image}.png", _encoded(picture, "PNG"))
    tar.finish()
    details = [
        {"task": v.task, "prompt": v.number, "text": v.prompt, "image": v.image, "correct": v.correct}
        | {"reasons": "; ".join(v.reasons)}
        for v in verdicts
    ]
    report = EvalReport(
        protocol="geneval",
        judge="shapes",
        prompts=digest([prompt.metadata() for prompt in prompts]),
        checkpoint=made.named[checkpoint].digest(),
        images=len(verdicts),
        failed=0,
        scores={f"geneval/{task}": score for task, score in intervals(geneval.by_task(verdicts), draws=500).items()},
        details=put_data(made.store, "evaluations", f"{name}.parquet", parquet_bytes(pa.Table.from_pylist(details))),
        pictures=[put_data(made.store, "evaluations", f"{name}.tar", buffer.getvalue())],
    )
    output = {"record": made.put(name, report), "scores": {k: v.value for k, v in report.scores.items()}}
    made.stage(name, "evaluate", output, checkpoint=checkpoint, settings={"images": images}, seconds=12.3)


def _drawn(prompt: Prompt, prompts: list[Prompt], seed: int, quality: float, size: int, rng: random.Random) -> Any:
    """A true picture, or, where a worse model errs, one of another prompt; never quite clean."""
    asked = prompt if rng.random() < quality else rng.choice(prompts)
    pixels = correct_picture(asked.prompt, seed, size).astype(np.float32)
    noise = np.random.default_rng(seed).normal(0, 9 * (1 - quality), pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _encoded(pixels: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()

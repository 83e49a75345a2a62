"""A GenEval run: draw the pictures, judge them, compute scores, and write the report's record last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from infra import layout
from infra.actors import Needs, PoolSettings
from infra.config import digest
from infra.files import sha256_of
from infra.records import CheckpointRecord, EvalReport, put_data, recorded
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import folders
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.chunks import Chunk, Shelf, Show, make
from pipelines.evaluation.generate import DrawingSettings, Order, chunked, generate
from pipelines.evaluation.judges import ShapeJudge
from pipelines.evaluation.judging import Judging, table_of, verdicts_of
from pipelines.evaluation.prompts import Prompt, load_prompts, shape_prompts
from pipelines.evaluation.statistics import intervals
from pipelines.evaluation.tars import PICTURES, ToJudge, place, tars


class GenevalSettings(PoolSettings):
    prompts: str = Field("shapes", description="`shapes`: the shape world's own; or a JSONL file of GenEval metadata")
    per_task: int = Field(12, ge=2, description="prompts a task of the shape world's set")
    images: int = Field(4, ge=1, description="pictures a prompt, from seeds 0, 1, ...")
    judge: Literal["shapes"] = "shapes"
    sampling: DrawingSettings = DrawingSettings()
    seed: int = Field(0, description="of the bootstrap")


def prompts_digest(settings: GenevalSettings) -> str:
    """A digest of the prompts themselves, as a file may change while its name does not."""
    return digest([prompt.metadata() for prompt in read_prompts(settings)])


def read_prompts(settings: GenevalSettings) -> list[Prompt]:
    return shape_prompts(settings.per_task) if settings.prompts == "shapes" else load_prompts(Path(settings.prompts))


def geneval(
    store: Store,
    stage: str,
    checkpoint: CheckpointRecord,
    settings: GenevalSettings,
    show: Show,
    needs: Needs | None = None,
) -> EvalReport:
    """Evaluate a checkpoint by GenEval; what an interrupted run drew and judged is used again."""
    prompts = [prompt.prompt for prompt in read_prompts(settings)]
    needs = needs or settings.needs
    order = Order(store, stage, checkpoint, settings.images, settings.sampling, needs)
    return judged(store, stage, checkpoint.digest(), generate(order, prompts, show), settings, show, needs)


def geneval_of_folder(store: Store, folder: Path, settings: GenevalSettings, show: Show) -> EvalReport:
    """Judge pictures that are in a folder: another model's, perhaps."""
    prompts = read_prompts(settings)
    counted = settings.model_copy(update={"sampling": DrawingSettings(batch=settings.sampling.batch)})
    pictures = digest(
        {
            str(path.relative_to(folder)): sha256_of(path)
            for path in sorted(folder.glob("*/samples/*"))
            if path.is_file()
        }
    )
    stage = digest([pictures, prompts_digest(settings), counted.chosen()])
    drawn = folders.taken(store, stage, folder, prompts, settings.images, settings.sampling)
    return judged(store, stage, f"folder-{pictures}", drawn, settings, show, settings.needs)


def judged(
    store: Store,
    stage: str,
    checkpoint: str,
    drawn: Sequence[Chunk],
    settings: GenevalSettings,
    show: Show,
    needs: Needs,
) -> EvalReport:
    """The report on pictures that are there. `checkpoint` tells whose they are."""
    prompts, judge = read_prompts(settings), ShapeJudge()
    chunks = chunked([prompt.prompt for prompt in prompts], settings.images, settings.sampling)
    items = {
        first: ToJudge(chunk.data[PICTURES], asked.pictures(settings.images), chunk.failed)
        for (first, asked), chunk in zip(chunks.items(), drawn, strict=True)
        if PICTURES in chunk.data
    }
    judging = make(Shelf(store, layout.ANSWERED, stage), Judging(store, judge, prompts), items, needs, show)
    failed = {place(name): cause for chunk in (*drawn, *judging) for name, cause in chunk.failed.items()}
    verdicts = [verdict for chunk in judging for verdict in verdicts_of(store, chunk)]
    verdicts += [_missing(prompts, number, image, cause) for (number, image), cause in failed.items()]
    verdicts.sort(key=lambda verdict: (verdict.number, verdict.image))
    scores = intervals(protocol.by_task(verdicts), seed=settings.seed)
    report = EvalReport(
        protocol="geneval",
        judge=judge.name,
        prompts=prompts_digest(settings),
        checkpoint=checkpoint,
        images=len(verdicts),
        failed=len(failed),
        scores={f"geneval/{task}": interval for task, interval in scores.items()},
        details=put_data(store, layout.VERDICTS.at(stage=stage), "verdicts.parquet", parquet_bytes(table_of(verdicts))),
        pictures=tars(drawn),
        devices=sorted({chunk.device for chunk in (*drawn, *judging)}),
    )
    return recorded(store, layout.REPORT.at(stage=stage), report)


def _missing(prompts: Sequence[Prompt], number: int, image: int, cause: str) -> protocol.Verdict:
    """A picture that could not be made or judged counts as wrong."""
    prompt = prompts[number]
    return protocol.Verdict(prompt.tag, number, prompt.prompt, image, (f"no verdict: {cause}",))

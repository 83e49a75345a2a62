"""A GenEval run: draw the pictures, judge them, compute scores, and write the report's record last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from pipelines.evaluation.detector.settings import JudgeSettings, identity, name_of
from pipelines.evaluation.generate import DrawingSettings, Order, chunked, generate, to_look_at
from pipelines.evaluation.judging import DETECTIONS, Judging, table_of, verdicts_of
from pipelines.evaluation.prompts import Prompt
from pipelines.evaluation.sets import PromptSettings, prompt_set, prompts_digest, read_prompts
from pipelines.evaluation.statistics import intervals
from pipelines.evaluation.tars import ToJudge, place, tars


class GenevalSettings(PromptSettings, PoolSettings):
    images: int = Field(4, ge=1, description="pictures a prompt, from seeds 0, 1, ...")
    judge: JudgeSettings = "shapes"
    sampling: DrawingSettings = DrawingSettings()
    seed: int = Field(0, description="of the bootstrap")

    def chosen(self) -> dict[str, Any]:
        """With the judge, even the one that is the default: digests have always held its name."""
        return {"judge": self.judge, **super().chosen()}


def outside(settings: GenevalSettings) -> str:
    """What results depend on besides settings: the prompts, and the weights of a judge that has some."""
    prompts, weights = prompts_digest(settings), identity(settings.judge)
    return prompts if weights is None else digest([prompts, weights])


def stage_of(checkpoint: str, settings: GenevalSettings) -> str:
    """Where an evaluation lies that no workflow names: a digest of what its results depend on."""
    own = settings.prompts == "shapes" and settings.judge == "shapes"
    return digest([checkpoint, settings.chosen(), *([] if own else [outside(settings)])])


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
    stage = digest([pictures, outside(settings), counted.chosen()])
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
    prompts, items = read_prompts(settings), to_judge(drawn, settings)
    judge = Judging(store, settings.judge, prompts, max(1, int(needs.cpus)))
    judging = make(Shelf(store, layout.ANSWERED, stage), judge, items, needs, show)
    verdicts, failed = verdicts_on(store, prompts, drawn, judging)
    scores = intervals(protocol.by_task(verdicts), seed=settings.seed)
    report = EvalReport(
        protocol="geneval",
        judge=name_of(settings.judge),
        prompts=prompts_digest(settings),
        checkpoint=checkpoint,
        images=len(verdicts),
        failed=failed,
        scores={f"geneval/{task}": interval for task, interval in scores.items()},
        details=put_data(store, layout.VERDICTS.at(stage=stage), "verdicts.parquet", parquet_bytes(table_of(verdicts))),
        pictures=tars(drawn),
        devices=sorted({chunk.device for chunk in (*drawn, *judging)}),
        prompt_set=prompt_set(settings),
        weights=identity(settings.judge) or {},
        detections=[chunk.data[DETECTIONS] for chunk in judging if DETECTIONS in chunk.data],
    )
    return recorded(store, layout.REPORT.at(stage=stage), report)


def to_judge(drawn: Sequence[Chunk], settings: GenevalSettings) -> dict[int, ToJudge]:
    asked = chunked([prompt.prompt for prompt in read_prompts(settings)], settings.images, settings.sampling)
    return to_look_at(asked, settings.images, drawn)


def verdicts_on(
    store: Store, prompts: Sequence[Prompt], drawn: Sequence[Chunk], judging: Sequence[Chunk]
) -> tuple[list[protocol.Verdict], int]:
    """A verdict on every picture, in their order, and how many have failed."""
    failed = {place(name): cause for chunk in (*drawn, *judging) for name, cause in chunk.failed.items()}
    verdicts = [verdict for chunk in judging for verdict in verdicts_of(store, chunk)]
    verdicts += [_missing(prompts, number, image, cause) for (number, image), cause in failed.items()]
    verdicts.sort(key=lambda verdict: (verdict.number, verdict.image))
    return verdicts, len(failed)


def _missing(prompts: Sequence[Prompt], number: int, image: int, cause: str) -> protocol.Verdict:
    """A picture that could not be made or judged counts as wrong."""
    prompt = prompts[number]
    return protocol.Verdict(prompt.tag, number, prompt.prompt, image, (f"no verdict: {cause}",))

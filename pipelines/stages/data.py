"""Stages that make data: the demo's corpus, shards, scores of their images, and snapshots, which training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from data_prep.prepare.plan import PrepareSettings, read_plan
from data_prep.rejections import counted
from data_prep.scores.job import ScoreSettings, Tables, scorer_digest
from data_prep.snapshots import checks
from data_prep.snapshots.forget import concerning
from data_prep.snapshots.settings import SnapshotSettings
from infra import layout, scratch
from infra.actors import Needs
from infra.config import Settings
from infra.problems import Wrong
from infra.records import CorpusOutput, Output, PrepareSummary, ScoreSummary, SnapshotOutput
from infra.store import Store
from pipelines.stages.base import Below, Context, Inputs, StageKind, stage_reference


class CorpusStage(Settings):
    count: int = Field(6000, ge=1, description="images, the deliberately bad ones among them")
    seed: int = 0
    size: int = Field(64, ge=16, description="side of the images, in pixels")


def corpus(context: Context, settings: CorpusStage, inputs: Inputs) -> Output:
    """The shape world, a synthetic corpus, written as an ordinary image folder with a table of captions."""
    from data_prep.shapes.corpus import write_corpus

    folder = context.home / layout.CORPUS.at(stage=context.digest)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch.folder("corpus", folder.parent) as unfinished:
            write_corpus(unfinished / "new", settings.count, settings.seed, settings.size)
            (unfinished / "new").rename(folder)
    files = Counter(path.suffix.lstrip(".") for path in (folder / "images").iterdir())
    return CorpusOutput(folder=str(folder.absolute()), files=dict(sorted(files.items())))


STAGE_URL = "stage:"  # `url: stage:corpus` means the folder that the stage `corpus` writes


def source_references(settings: PrepareSettings) -> dict[str, str]:
    return {
        f"sources.{number}": source.url.removeprefix(STAGE_URL)
        for number, source in enumerate(settings.sources)
        if source.url.startswith(STAGE_URL)
    }


def source_inputs(settings: PrepareSettings, store: Store | None, inputs: Inputs) -> Any:
    """The files of the user's own corpora and the retries asked for so far: each new one is new work."""
    from data_prep.prepare import links, retries
    from data_prep.sources import UrlSource

    files: list[Any] = []
    for source in settings.sources:
        for file in () if source.url.startswith(STAGE_URL) else source.inputs():
            retried = []
            if store is not None and isinstance(source, UrlSource):
                retried = retries.retries(store, links.place(source, file.name, file.sha256, settings.fetch))
            files.append([source.name, file[:3], [record.digest() for record in retried]])
    return files


def prepare(context: Context, settings: PrepareSettings, inputs: Inputs) -> Output:
    """Raw images -> shards in the store; every input ends as a sample or as a rejection with a cause."""
    from data_prep.prepare.job import Progress as PrepareProgress
    from data_prep.prepare.job import check_accepted
    from data_prep.prepare.job import prepare as run

    sources = list(settings.sources)
    for field, record in inputs.items():
        number = int(field.rpartition(".")[2])
        sources[number] = sources[number].model_copy(update={"url": record.of(CorpusOutput).folder})

    def show(so_far: PrepareProgress) -> None:
        rejected = next(iter(so_far.rejected.values()), {})
        parts = [
            f"{so_far.shards:,} of {so_far.planned_shards:,} shards",
            f"{so_far.inputs:,} of {so_far.planned_inputs:,} images",
            f"{so_far.downloads:,} of {so_far.planned_downloads:,} downloads" if so_far.planned_downloads else "",
            f"{so_far.per_second:.0f} images/s" if so_far.per_second else "",
            counted(rejected) if rejected else "",
        ]
        own = so_far.own_inputs / max(1, so_far.planned_inputs)
        context.progress(", ".join(filter(None, parts)), so_far.shards, so_far.planned_shards, own)

    given = settings.model_copy(update={"sources": sources})
    summary = run(context.store, given, show, check_held=context.check_held)
    for size, counts in summary.sizes.items():
        rejected = {f"prepare/{size}/rejected_{cause}": n for cause, n in counts.rejected.items()}
        context.run.metrics({f"prepare/{size}/accepted": counts.accepted, **rejected}, 0)
    check_accepted(summary)
    return summary


class ScoreStage(ScoreSettings):
    shards: str = stage_reference()
    size: int | str = Field(256, description="one of the sizes that were prepared")


def check_score(settings: ScoreStage, below: Below) -> Iterator[Wrong]:
    yield from checks.size(settings.size, settings.shards, below["shards"])


def score(context: Context, settings: ScoreStage, inputs: Inputs) -> Output:
    """Shards -> scores or captions of their images, in tables beside the shards."""
    from data_prep.scores.job import Progress as ScoreProgress
    from data_prep.scores.job import score as run

    def show(so_far: ScoreProgress) -> None:
        text = f"{so_far.shards} of {so_far.planned_shards} shards, {so_far.per_second:.1f} images/s"
        failed = sum(so_far.failures.values())
        context.progress(f"{text}, {failed:,} failed" if failed else text, so_far.shards, so_far.planned_shards)

    prepared = inputs["shards"].of(PrepareSummary)
    summary = run(context.store, prepared.plan, prepared.edition, str(settings.size), settings, show)
    failures = {f"score/failed_{cause}": count for cause, count in summary.failures.items()}
    context.run.metrics({"score/rows": summary.rows, **failures}, 0)
    return summary


class SnapshotStage(SnapshotSettings):
    shards: str = stage_reference()
    scored: list[str] = stage_reference([])


def forgotten_lists(settings: SnapshotStage, store: Store | None, inputs: Inputs) -> Any:
    """The lists of `pixnerd data forget` that may concern its shards; others renew neither snapshot nor training.

    Which shards it reads is known only once they are prepared; until then no list counts.
    """
    prepared = inputs["shards"].of(PrepareSummary) if "shards" in inputs else None
    size = str(settings.size)
    if store is None or prepared is None or size not in prepared.sizes:
        return []  # the stage itself refuses a size that was not prepared
    plan = read_plan(store, prepared.plan, prepared.edition)
    return [layout.FORGOTTEN.at(items=name) for name in concerning(store, plan, size)]


def check_snapshot(settings: SnapshotStage, below: Below) -> Iterator[Wrong]:
    yield from checks.size(settings.size, settings.shards, below["shards"])
    scorers = [below[f"scored.{number}"].scorer for number in range(len(settings.scored))]
    yield from checks.snapshot(settings, below["shards"], scorers)


def snapshot(context: Context, settings: SnapshotStage, inputs: Inputs) -> Output:
    """Shards + scores + filter + caption mix -> the list of samples that training reads."""
    from data_prep.snapshots.build import snapshot as run
    from data_prep.snapshots.build import snapshot_key

    prepared = inputs["shards"].of(PrepareSummary)
    summaries = [inputs[f"scored.{number}"].of(ScoreSummary) for number in range(len(settings.scored))]
    scored = [Tables(summary.scorer, summary.size).name(str(settings.size)) for summary in summaries]
    scores = [*settings.scores, *scored]
    plain = SnapshotSettings(**settings.model_dump(exclude={"shards", "scored", "scores"}), scores=scores)
    record = run(context.store, prepared.plan, prepared.edition, plain)
    key = snapshot_key(prepared.plan, prepared.edition, plain, record.forgotten)
    context.run.metrics({"snapshot/rows": record.rows, "snapshot/held_out": record.held_out_rows}, 0)
    classes = settings.labels.classes if settings.labels is not None else None
    return SnapshotOutput(record=key, rows=record.rows, counts=record.counts, size=record.size, classes=classes)


KINDS = (
    StageKind("corpus", CorpusStage, corpus),
    StageKind(
        "prepare",
        PrepareSettings,
        prepare,
        source_references,
        source_inputs,
        takes={"sources": "corpus"},
        needs=lambda settings: Needs(),  # as many tasks as the cluster has CPUs
    ),
    StageKind(
        "score",
        ScoreStage,
        score,
        outside=lambda settings, store, inputs: scorer_digest(settings),  # of local files by their bytes
        check=check_score,
        takes={"shards": "prepare"},
    ),
    StageKind(
        "snapshot",
        SnapshotStage,
        snapshot,
        outside=forgotten_lists,
        check=check_snapshot,
        takes={"shards": "prepare", "scored": "score"},
    ),
)

"""The stages of a workflow: settings and records in, one record out. Each reads like the paragraph that describes it.

    corpus -> prepare -> score -> snapshot -> encoders -> train -> sample, evaluate -> gate -> register -> report

A stage's function gets its context, its settings, and the records of the stages that its settings name; what it returns
becomes the `output` of its record, which is all that later stages know of it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from data_prep.prepare.plan import PrepareSettings, read_plan
from data_prep.rejections import counted
from data_prep.scores.job import ScoreSettings, scorer_digest
from data_prep.snapshots.build import SnapshotSettings
from data_prep.snapshots.forget import concerning
from infra import layout, scratch
from infra.config import Settings, parse, spelt
from infra.errors import SettingsError, StageFailed
from infra.problems import Wrong
from infra.records import (
    CheckpointRecord,
    CorpusOutput,
    DataObject,
    EncodersOutput,
    EvalReport,
    EvaluateOutput,
    GateOutput,
    Output,
    PrepareSummary,
    RegisterOutput,
    ReportOutput,
    SampleOutput,
    ScoreSummary,
    SnapshotOutput,
    SnapshotRecord,
    StageRecord,
    TrainOutput,
    Verdict,
    get_data,
    put_data,
    read_record,
)
from infra.store import Store
from infra.tracking import NOWHERE, Run, Tracker
from pipelines.evaluation.run import GenevalSettings, prompts_digest
from pipelines.sample import held_out
from pipelines.sample.held_out import DrawSettings
from pipelines.stages import checks
from training.encoders.known import known
from training.loop import TrainSettings

log = logging.getLogger(__name__)

Inputs = Mapping[str, StageRecord]


@dataclass(frozen=True)
class Progress:
    """How far a stage is: what a terminal draws as a bar and a log file gets as a line now and then."""

    text: str
    done: int = 0
    total: int = 0
    own: float = 0.0  # the part of all that this run did, where it tells: others may work beside it


@dataclass(frozen=True)
class Context:
    """What a stage may use: the store, a folder of this machine, the tracker, and somebody who listens."""

    store: Store
    home: Path
    tracker: Tracker
    parent: Run
    show: Callable[[str, Progress], None]
    stage: str = ""
    digest: str = ""
    run: Run = NOWHERE

    def for_stage(self, stage: str, kind: str, of: str) -> Context:
        run = self.tracker.run(stage, of, self.parent, {"pixnerd.kind": kind})
        return replace(self, stage=stage, digest=of, run=run)

    def progress(self, text: str, done: int = 0, total: int = 0, own: float = 0.0) -> None:
        self.show(self.stage, Progress(text, done, total, own))


def stage_reference(default: Any = ...) -> Any:
    """A setting that names another stage. The name itself changes no result: that stage's digest does."""
    return Field(default, json_schema_extra={"operational": True, "stage": True})


def references(settings: Settings) -> dict[str, str]:
    """`field` or `field.number` -> the stage that it names."""
    found: dict[str, str] = {}
    for name, info in type(settings).model_fields.items():
        if not (isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("stage")):
            continue
        value = getattr(settings, name)
        if isinstance(value, str):
            found[name] = value
        elif value is not None:
            found |= {f"{name}.{number}": target for number, target in enumerate(value)}
    return found


# ------------------------------------------------------------------------------------------------ data


class CorpusStage(Settings):
    count: int = Field(6000, ge=1, description="images, the deliberately bad ones among them")
    seed: int = 0
    size: int = Field(64, ge=16, description="side of the images, in pixels")


def corpus(context: Context, settings: CorpusStage, inputs: Inputs) -> Output:
    """The shape world, written as an ordinary image folder with a table of captions, as any corpus would come."""
    from data_prep.shapes.corpus import write_corpus

    folder = context.home / layout.CORPUS.at(stage=context.digest)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch.folder("corpus", folder.parent) as unfinished:
            write_corpus(unfinished / "new", settings.count, settings.seed, settings.size)
            (unfinished / "new").rename(folder)
    files = Counter(path.suffix.lstrip(".") for path in (folder / "images").iterdir())
    return CorpusOutput(folder=str(folder.absolute()), files=dict(sorted(files.items())))


STAGE_URL = "stage:"  # a source's url may be another stage's folder: `url: stage:corpus`


def source_references(settings: PrepareSettings) -> dict[str, str]:
    return {
        f"sources.{number}": source.url.removeprefix(STAGE_URL)
        for number, source in enumerate(settings.sources)
        if source.url.startswith(STAGE_URL)
    }


def source_inputs(settings: PrepareSettings, store: Store | None, inputs: Inputs) -> Any:
    """The user's own corpora by their files, and the retries that were asked for: more of either is more to do."""
    from data_prep import sources
    from data_prep.prepare import links, retries

    found: list[Any] = []
    for source in settings.sources:
        for given in () if source.url.startswith(STAGE_URL) else sources.inputs(source):
            again = []
            if store is not None and isinstance(source, sources.UrlList):
                place = links.place(source, given.name, given.sha256, settings.fetch)
                again = retries.retries(store, place)
            found.append([source.name, given[:3], [record.digest() for record in again]])
    return found


def prepare(context: Context, settings: PrepareSettings, inputs: Inputs) -> Output:
    """Raw images -> shards in the store, every input accounted for."""
    from data_prep.prepare.job import Progress as Prepared
    from data_prep.prepare.job import check_accepted
    from data_prep.prepare.job import prepare as run

    sources = list(settings.sources)
    for field, record in inputs.items():
        number = int(field.rpartition(".")[2])
        sources[number] = sources[number].model_copy(update={"url": record.of(CorpusOutput).folder})

    def show(so_far: Prepared) -> None:
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

    summary = run(context.store, settings.model_copy(update={"sources": sources}), show)
    for size, counts in summary.sizes.items():
        rejected = {f"prepare/{size}/rejected_{cause}": n for cause, n in counts.rejected.items()}
        context.run.metrics({f"prepare/{size}/accepted": counts.accepted, **rejected}, 0)
    check_accepted(summary)
    return summary


class ScoreStage(ScoreSettings):
    shards: str = stage_reference()
    size: int | str = Field(256, description="one of the sizes that were prepared")


def scorer_weights(settings: ScoreStage, store: Store | None, inputs: Inputs) -> Any:
    """Weights in local files count by their bytes."""
    return scorer_digest(settings)


def score(context: Context, settings: ScoreStage, inputs: Inputs) -> Output:
    """Shards -> scores or captions of their images, in tables of their own."""
    from data_prep.scores.job import Progress as Scored
    from data_prep.scores.job import score as run

    def show(so_far: Scored) -> None:
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
    """The lists that may concern its shards: others make no snapshot anew, nor the training after it.

    Which shards it has is not known before they are prepared; until then it counts as if nothing were forgotten.
    """
    prepared = inputs["shards"].of(PrepareSummary) if "shards" in inputs else None
    size = str(settings.size)
    if store is None or prepared is None or size not in prepared.sizes:
        return []  # a size that was not prepared is the stage's own error
    plan = read_plan(store, prepared.plan, prepared.edition)
    return [layout.FORGOTTEN.at(items=name) for name in concerning(store, plan, size)]


def snapshot(context: Context, settings: SnapshotStage, inputs: Inputs) -> Output:
    """Shards + scores + filter + caption mix -> the rows that training reads."""
    from data_prep.snapshots.build import snapshot as run
    from data_prep.snapshots.build import snapshot_key

    prepared = inputs["shards"].of(PrepareSummary)
    scored = [inputs[f"scored.{number}"].of(ScoreSummary).scorer for number in range(len(settings.scored))]
    scores = [*settings.scores, *scored]
    plain = SnapshotSettings(**settings.model_dump(exclude={"shards", "scored", "scores"}), scores=scores)
    record = run(context.store, prepared.plan, prepared.edition, plain)
    key = snapshot_key(prepared.plan, prepared.edition, plain, record.forgotten)
    context.run.metrics({"snapshot/rows": record.rows, "snapshot/held_out": record.held_out_rows}, 0)
    return SnapshotOutput(record=key, rows=record.rows, counts=record.counts, size=record.size)


# ------------------------------------------------------------------------------------------------ training


class TinyText(Settings):
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    vocab: int = Field(512, ge=300)


class TinyVision(Settings):
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    patch_size: int = 8
    image_size: int = 32


class EncodersStage(Settings):
    captions: str = stage_reference()
    text: TinyText = TinyText()
    vision: TinyVision = TinyVision()
    seed: int = 0


def encoders(context: Context, settings: EncodersStage, inputs: Inputs) -> Output:
    """A small Qwen3 with a tokenizer of the corpus's own captions, and a small DINOv2, where no hub is needed."""
    from infra.shards import read_selection
    from training.encoders import text, vision

    record = _snapshot(context.store, inputs["captions"])
    rows = read_selection(context.store, record, columns=["captions"])["captions"]
    captions = [caption for row in rows.to_pylist() for caption in row]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text.build_tiny(folder / "text", captions, seed=settings.seed, **settings.text.model_dump())
        vision.build_tiny(folder / "vision", seed=settings.seed, **settings.vision.model_dump())
        return EncodersOutput(**{part: _put_encoder(context, part, folder / part) for part in ("text", "vision")})


def _put_encoder(context: Context, name: str, folder: Path) -> dict[str, DataObject]:
    where = layout.ENCODER_FILES.at(stage=context.digest, encoder=name)
    return {path.name: put_data(context.store, where, path.name, path) for path in sorted(folder.iterdir())}


def _snapshot(store: Store, stage: StageRecord) -> SnapshotRecord:
    return read_record(store, stage.of(SnapshotOutput).record, SnapshotRecord)


def _checkpoint(store: Store, stage: StageRecord) -> CheckpointRecord:
    return read_record(store, stage.of(TrainOutput).record, CheckpointRecord)


def _report(store: Store, stage: StageRecord) -> EvalReport:
    return read_record(store, stage.of(EvaluateOutput).record, EvalReport)


class TrainStage(TrainSettings):
    data: str = stage_reference()
    start_from: str | None = stage_reference(None)
    encoders: str | None = stage_reference(None)
    text_encoder: str = Field("Qwen/Qwen3-1.7B", description="a published text encoder, where `encoders` is not given")
    vision_encoder: str = Field("facebook/dinov2-base", description="for REPA, where `encoders` is not given")


def train(context: Context, settings: TrainStage, inputs: Inputs) -> Output:
    """A snapshot -> a checkpoint, from scratch or from an earlier stage's EMA weights."""
    from training.loop import Job
    from training.ray_train import fit

    store, own = context.store, {"data", "start_from", "encoders", "text_encoder", "vision_encoder"}
    given = inputs["encoders"].of(EncodersOutput) if "encoders" in inputs else None
    start = inputs.get("start_from")
    data = _snapshot(store, inputs["data"])
    plain = settings.model_dump(exclude=own)
    size = int(data.size) if data.size.isdigit() else None
    plain["model"] = fitted(settings.model, size, _text_width(store, settings, inputs))
    job = Job(
        store=store,
        prefix=layout.TRAINING.at(run=context.digest),
        digest=context.digest,
        settings=parse(TrainSettings, plain),
        snapshot=data,
        text=given.text if given else settings.text_encoder,
        vision=given.vision if given else settings.vision_encoder,
        start_from=_checkpoint(store, start) if start else None,
        run=NOWHERE,  # rank 0 may be on a machine that does not see the tracker's database
    )
    _log_lineage(context, settings, data, inputs["data"].of(SnapshotOutput).record)

    def show(message: dict[str, Any]) -> None:
        if message["event"] == "start":
            context.progress(f"step {message['step']} of {message['steps']}", message["step"], message["steps"])
        if message["event"] == "log":
            speed = f"{message['train/images_per_second']:.0f} images/s"
            text = f"step {message['step']} of {message['steps']}, loss {message['train/loss']:.4f}, {speed}"
            context.progress(text, message["step"], message["steps"])
            context.run.metrics({name: value for name, value in message.items() if "/" in name}, message["step"])
        if message["event"] == "told":
            log.warning("%s: %s", context.stage, message["text"])
        if message["event"] == "waiting":
            context.progress(f"another run on {message['host']} trains this already; waiting for it to end")

    context.progress(f"starting {settings.workers} ranks" if settings.workers > 1 else "starting")
    record = fit(job, show)
    return TrainOutput(
        record=layout.CHECKPOINT.at(home=job.prefix),
        parameters=record.parameters,
        images_seen=record.position,
        image_size=job.settings.network().image_size,
    )


def fitted(model: Mapping[str, Any], size: int | None, width: int) -> dict[str, Any]:
    """A network's settings; where they do not say otherwise, its sides are its data's, and its text its encoder's."""
    return {"text_dim": width, **({} if size is None else {"image_size": size}), **model}


def _text_width(store: Store, settings: TrainStage, inputs: Inputs) -> int:
    """As it is set; else of the network whose weights are inherited, or of the text encoder."""
    if "text_dim" in settings.model:
        return int(settings.model["text_dim"])
    if "start_from" in inputs:
        start = _checkpoint(store, inputs["start_from"])
        return int(json.loads(get_data(store, start.files["config.json"]))["model"]["text_dim"])
    if "encoders" in inputs:
        config = inputs["encoders"].of(EncodersOutput).text["config.json"]
        return int(json.loads(get_data(store, config))["hidden_size"])
    return known(settings.text_encoder).width


def _log_lineage(context: Context, settings: Settings, data: SnapshotRecord, key: str) -> None:
    context.run.params(_flat(settings.results()))
    where = f"{context.store.url}/{key}"
    context.run.dataset(f"snapshot-{data.size}", data.digest(), where, {"rows": data.rows}, "training")


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{path}{key}.") if isinstance(inner, dict) else {f"{path}{key}": inner}
    return found


# ------------------------------------------------------------------------------------------------ measuring


class SampleStage(DrawSettings):
    checkpoint: str = stage_reference()
    data: str = stage_reference()


def sample(context: Context, settings: SampleStage, inputs: Inputs) -> Output:
    """A checkpoint -> pictures for captions that training never saw, on the page and on a sheet of their own."""
    checkpoint, data = _checkpoint(context.store, inputs["checkpoint"]), _snapshot(context.store, inputs["data"])
    plain = DrawSettings(**settings.model_dump(exclude={"checkpoint", "data"}))
    drawn = held_out.draw(context.store, context.digest, checkpoint, data, plain, context.progress)
    path = context.home / f"{context.stage}.png"
    held_out.write_sheet(context.store, drawn, f"{inputs['checkpoint'].stage}, step {checkpoint.step:,}", path)
    context.run.artifact(path)
    record = layout.SAMPLES.at(stage=context.digest)
    return SampleOutput(record=record, sheet=str(path.absolute()), prompts=len(drawn.prompts))


class EvaluateStage(GenevalSettings):
    checkpoint: str = stage_reference()


def evaluate(context: Context, settings: EvaluateStage, inputs: Inputs) -> Output:
    """A checkpoint -> GenEval's six tasks with intervals."""
    from pipelines.evaluation.run import geneval

    checkpoint = _checkpoint(context.store, inputs["checkpoint"])
    plain = GenevalSettings(**settings.model_dump(exclude={"checkpoint"}))
    report = geneval(context.store, context.digest, checkpoint, plain, context.progress)
    scores = {name: interval.value for name, interval in report.scores.items()}
    context.run.metrics(scores, checkpoint.step)
    context.run.tags({"pixnerd.checkpoint": report.checkpoint, "pixnerd.judge": report.judge})
    context.parent.metrics({f"{inputs['checkpoint'].stage}/{name}": value for name, value in scores.items()}, 0)
    return EvaluateOutput(record=layout.REPORT.at(stage=context.digest), scores=scores)


class Rule(Settings):
    """A score must reach a value, or beat another stage's, or both."""

    score: str = "geneval/overall"
    at_least: float | None = None
    above: str | None = Field(None, description="the stage of `scores` that must be beaten")

    @model_validator(mode="after")
    def _judges_something(self) -> Rule:
        if self.at_least is None and self.above is None:
            raise ValueError("a rule needs `at_least` or `above`")
        return self


class GateStage(Settings):
    scores: list[str] = stage_reference()  # the first is judged
    rules: list[Rule] = Field(min_length=1)


def gate(context: Context, settings: GateStage, inputs: Inputs) -> Output:
    """Is the model good enough to be registered? The verdict is recorded either way."""
    reports = {name: _report(context.store, inputs[f"scores.{number}"]) for number, name in enumerate(settings.scores)}
    judged = reports[settings.scores[0]]
    verdicts = []
    for rule in settings.rules:
        value = _score(judged, rule.score)
        limits = [("at least", rule.at_least, rule.at_least is None or value >= rule.at_least)]
        if rule.above is not None:
            other = _score(reports[rule.above], rule.score)
            limits.append((f"above {rule.above}'s", other, value > other))
        verdicts += [
            Verdict(score=rule.score, value=value, limit=f"{text} {limit:.3f}", passed=passed)
            for text, limit, passed in limits
            if limit is not None
        ]
    passed = all(verdict.passed for verdict in verdicts)
    context.run.tags({"pixnerd.gate": "passed" if passed else "failed"})
    return GateOutput(passed=passed, verdicts=verdicts)


def _score(report: EvalReport, name: str) -> float:
    if name not in report.scores:
        raise SettingsError(f"the evaluation has no score `{name}`", remedy=f"it has {', '.join(report.scores)}")
    return report.scores[name].value


class RegisterStage(Settings):
    gate: str = stage_reference()
    checkpoint: str = stage_reference()
    scores: str = stage_reference()
    model: Annotated[str, spelt(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}", "letters, digits, blanks, `.`, `_` and `-`")] = (
        "pixnerd"
    )
    alias: Annotated[
        str, spelt(r"(?!(latest|v\d+)$)[A-Za-z0-9_-]{1,99}", "letters, digits, `_` and `-`, neither latest nor v1")
    ] = "champion"


def register(context: Context, settings: RegisterStage, inputs: Inputs) -> Output:
    """The checkpoint as a version of a registered model in MLflow; its weights stay where they are."""
    verdict = inputs["gate"].of(GateOutput)
    if not verdict.passed:
        missed = [f"{rule.score} is {rule.value:.3f}, not {rule.limit}" for rule in verdict.verdicts if not rule.passed]
        raise StageFailed(
            f"the gate is closed ({'; '.join(missed)})", remedy="train longer, or change the gate's rules on purpose"
        )
    checkpoint = _checkpoint(context.store, inputs["checkpoint"])
    report = _report(context.store, inputs["scores"])
    source = f"{context.store.url}/{inputs['checkpoint'].of(TrainOutput).record}"
    tags = {"pixnerd.checkpoint": checkpoint.digest(), "pixnerd.snapshot": checkpoint.snapshot, "judge": report.judge}
    scores = {name: interval.value for name, interval in report.scores.items()}
    made = context.tracker.register(settings.model, settings.alias, context.run, source, tags, scores)
    return RegisterOutput(model=settings.model, version=made, alias=settings.alias, source=source)


# ------------------------------------------------------------------------------------------------ telling


class ReportStage(Settings):
    title: str = "PixNerd"


def report(context: Context, settings: ReportStage, inputs: Inputs) -> Output:
    """One self-contained page: what went in, what came out, and how the one became the other."""
    from pipelines.page.report import build

    page = build(context.store, settings.title, list(inputs.values()))
    data = put_data(context.store, layout.PAGES.at(), "report.html", page.encode())
    path = context.home / "report.html"
    path.write_text(page, encoding="utf-8")
    context.parent.artifact(path)
    return ReportOutput(page=data, path=str(path.absolute()))


@dataclass(frozen=True)
class StageKind:
    name: str
    settings: type[Settings]
    work: Callable[[Context, Any, Inputs], Output]
    references: Callable[[Any], dict[str, str]] = references
    # What it reads that no setting tells, files' hashes for one; given the records of the stages before it, if done.
    outside: Callable[[Any, Store | None, Inputs], Any] = lambda settings, store, inputs: None
    # What is wrong beside the settings of the stages that it names, found before any work begins.
    check: Callable[[Any, Mapping[str, Settings]], Iterable[Wrong]] = lambda settings, below: ()
    takes: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # a setting that names stages -> the kind that they must be
    format: int = 1  # raised when the same settings and inputs would come to something else
    reads_all: bool = False  # it reads every other stage of the workflow, those that failed left out


KINDS = {
    kind.name: kind
    for kind in (
        StageKind("corpus", CorpusStage, corpus),
        StageKind("prepare", PrepareSettings, prepare, source_references, source_inputs, takes={"sources": "corpus"}),
        StageKind("score", ScoreStage, score, outside=scorer_weights, check=checks.score, takes={"shards": "prepare"}),
        StageKind(
            "snapshot",
            SnapshotStage,
            snapshot,
            outside=forgotten_lists,
            check=checks.snapshot,
            takes={"shards": "prepare", "scored": "score"},
        ),
        StageKind("encoders", EncodersStage, encoders, takes={"captions": "snapshot"}),
        StageKind(
            "train",
            TrainStage,
            train,
            check=checks.train,
            takes={"data": "snapshot", "start_from": "train", "encoders": "encoders"},
        ),
        StageKind("sample", SampleStage, sample, takes={"checkpoint": "train", "data": "snapshot"}),
        StageKind(
            "evaluate",
            EvaluateStage,
            evaluate,
            outside=lambda settings, store, inputs: prompts_digest(settings),
            takes={"checkpoint": "train"},
        ),
        StageKind("gate", GateStage, gate, check=checks.gate, takes={"scores": "evaluate"}),
        StageKind(
            "register", RegisterStage, register, takes={"gate": "gate", "checkpoint": "train", "scores": "evaluate"}
        ),
        StageKind("report", ReportStage, report, reads_all=True),
    )
}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("pixnerd", "torch", "deepspeed", "ray", "transformers")}

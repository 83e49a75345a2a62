"""Stages that train: small encoders for runs without a hub, and the network."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from infra import layout
from infra.actors import Needs
from infra.config import Settings, operational, parse
from infra.problems import Wrong
from infra.records import (
    DataObject,
    EncodersOutput,
    Output,
    SnapshotOutput,
    SnapshotRecord,
    TrainOutput,
    get_data,
    put_data,
)
from infra.store import Store
from infra.tracking import NOWHERE
from pipelines.sample.previews import Preview, Previews, PreviewSettings
from pipelines.stages.base import Below, Context, Inputs, StageKind, checkpoint_of, snapshot_of, stage_reference
from pipelines.stages.data import SnapshotStage
from training.encoders.known import known
from training.model import outline
from training.model.fit import shapes
from training.model.presets import ModelConfig
from training.settings import TrainSettings

log = logging.getLogger(__name__)


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
    """A small Qwen3 with a tokenizer made from the corpus's captions, and a small DINOv2, for runs without a hub."""
    from infra.shards import read_selection
    from training.encoders import text, vision

    record = snapshot_of(context.store, inputs["captions"])
    rows = read_selection(context.store, record, columns=["captions"])["captions"]
    captions = [caption for row in rows.to_pylist() for caption in row]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text.build_tiny(folder / "text", captions, seed=settings.seed, **settings.text.model_dump())
        vision.build_tiny(folder / "vision", seed=settings.seed, **settings.vision.model_dump())
        return EncodersOutput(**{part: _put_encoder(context, part, folder / part) for part in ("text", "vision")})


def _put_encoder(context: Context, name: str, folder: Path) -> dict[str, DataObject]:
    prefix = layout.ENCODER_FILES.at(stage=context.digest, encoder=name)
    return {path.name: put_data(context.store, prefix, path.name, path) for path in sorted(folder.iterdir())}


_PUBLISHED = "a text encoder of the hub, NAME or NAME@REVISION, or a folder's path; where `encoders` is not given"


class TrainStage(TrainSettings):
    data: str = stage_reference()
    start_from: str | None = stage_reference(None)
    encoders: str | None = stage_reference(None)
    previews: PreviewSettings | None = operational(
        None, description="what is drawn of every checkpoint that `export_every` publishes, beside the training"
    )
    text_encoder: str = Field("Qwen/Qwen3-1.7B", description=_PUBLISHED)
    vision_encoder: str = Field(
        "facebook/dinov2-base", description="for REPA and perceptual.dino, where `encoders` is not given"
    )
    lpips: str | None = Field(
        None,
        description="for perceptual.lpips: a folder or hub repository with torchvision's vgg16 and LPIPS's vgg",
    )

    @property
    def task(self) -> str:
        return self.network().task


def check_train(settings: TrainStage, below: Below) -> Iterator[Wrong]:
    """Encoders and sizes are checked in pipelines.stages.fitting instead, which may have to ask a hub."""
    if settings.validation.every and not below["data"].held_out:
        yield Wrong("validation.every", f"is set, but `{settings.data}` holds no samples out", "set held_out there")
    if settings.previews is not None:
        yield from _no_previews(settings, settings.previews)
    if settings.objective.perceptual.lpips and settings.lpips is None:
        yield Wrong(
            "objective.perceptual.lpips",
            "needs a network that compares images, and `lpips` names none",
            "name a folder or hub repository with torchvision's vgg16 and LPIPS's weights/v0.1/vgg.pth as `lpips`",
        )
    yield from _other_condition(settings, below["data"])
    if settings.start_from is not None:
        yield from _other_network(settings.start_from, below["start_from"], settings)


def _no_previews(settings: TrainStage, previews: PreviewSettings) -> Iterator[Wrong]:
    if not settings.export_every:
        yield Wrong("previews", "are drawn of checkpoints on the way, and there are none", "set export_every")
    if settings.task == "class" and previews.per_task:
        told = "is a GenEval, whose prompts are texts, and this network draws from labels"
        yield Wrong("previews.per_task", told, "set it to 0")


def _other_condition(settings: TrainStage, data: SnapshotStage) -> Iterator[Wrong]:
    by_label, labels = settings.task == "class", data.labels
    if by_label and labels is None:
        remedy = f"give `{settings.data}` labels: {{column: label, classes: N}}"
        yield Wrong("data", f"names `{settings.data}`, which has no labels for this network to draw from", remedy)
    elif not by_label and labels is not None:
        remedy = "name a snapshot without `labels`, or a preset that draws from labels, such as XL/16"
        yield Wrong("data", f"names `{settings.data}`, which is made for training by labels", remedy)
    elif labels is not None and settings.model.get("classes", labels.classes) != labels.classes:
        told = f"has {settings.model['classes']} classes, and the labels of `{settings.data}` {labels.classes}"
        yield Wrong("model", told, "leave model.classes out: it follows the data")


def _other_network(start: str, before: TrainStage, settings: TrainStage) -> Iterator[Wrong]:
    theirs, ours = before.network(), settings.network()
    if not ("text_dim" in before.model and "text_dim" in settings.model):  # else it follows from the encoder
        ours = ours.model_copy(update={"text_dim": theirs.text_dim})
    if "classes" not in settings.model:  # it follows from the data
        ours = ours.model_copy(update={"classes": theirs.classes})
    if shapes(outline(theirs).state_dict()) == shapes(outline(ours).state_dict()):
        return
    # These three decide no tensor's shape: two are about the size of images, one about how training begins.
    names = [name for name in ModelConfig.model_fields if name not in ("image_size", "fixed_grid", "open_gates")]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    differences = [f"{name} {theirs} there, {ours} here" for name, theirs, ours in pairs if theirs != ours]
    yield Wrong(
        "model",
        f"is another network than that of `{start}`, whose weights it starts from ({', '.join(differences)})",
        "give both stages the same preset and model",
    )


def train(context: Context, settings: TrainStage, inputs: Inputs) -> Output:
    """A snapshot -> a checkpoint, from scratch or from an earlier stage's EMA weights."""
    from training.job import Job
    from training.ray_train import fit

    store = context.store
    encoders = inputs["encoders"].of(EncodersOutput) if "encoders" in inputs else None
    start = inputs.get("start_from")
    data = snapshot_of(store, inputs["data"])
    size = int(data.size) if data.size.isdigit() else None
    classes = inputs["data"].of(SnapshotOutput).classes
    job = Job(
        store=store,
        prefix=layout.TRAINING.at(run=context.digest),
        digest=context.digest,
        settings=parse(TrainSettings, fitted(settings, size, _text_width(store, settings, inputs), classes)),
        snapshot=data,
        text=encoders.text if encoders else settings.text_encoder,
        vision=encoders.vision if encoders else settings.vision_encoder,
        lpips=settings.lpips,
        start_from=checkpoint_of(store, start) if start else None,
        run=NOWHERE,  # rank 0 may be on a machine that cannot reach the tracker's database
    )
    _log_lineage(context, settings, data, inputs["data"].of(SnapshotOutput).record)

    context.progress(f"starting {settings.workers} ranks" if settings.workers > 1 else "starting")
    with _previews(context, settings, data) as previews:
        record = fit(job, partial(_show, context, previews))
    return TrainOutput(
        record=layout.CHECKPOINT.at(home=job.prefix),
        parameters=record.parameters,
        images_seen=record.position,
        image_size=job.settings.network().image_size,
    )


def _show(context: Context, previews: Previews | None, message: dict[str, Any]) -> None:
    """Pass on what rank 0 says: to the terminal, to MLflow, to what draws previews."""
    if message["event"] == "start":
        context.progress(f"step {message['step']} of {message['steps']}", message["step"], message["steps"])
        if message.get("left_out"):
            left_out = f"{message['left_out']:,} of {message['rows']:,} samples, others in each"
            log.info("%s: an epoch leaves out %s", context.stage, left_out)
    if message["event"] == "log":
        speed = f"{message['perf/images_per_second']:.0f} images/s"
        text = f"step {message['step']} of {message['steps']}, loss {message['train/loss']:.4f}, {speed}"
        context.progress(text, message["step"], message["steps"])
        figures = {name: value for name, value in message.items() if "/" in name}
        # MLflow's charts take a metric for their x-axis: images compare runs whose batches differ.
        context.run.metrics(figures | {"train/images": message["images"]}, message["step"])
    if message["event"] == "saved" and message.get("checkpoint"):
        context.progress(f"the checkpoint of step {message['step']} is {message['checkpoint']}")
        if previews is not None:
            previews.begin(message["step"], message["checkpoint"])
    if message["event"] in ("told", "truncated", "unreadable"):
        log.warning("%s: %s", context.stage, message["text"])
    if message["event"] == "stopped":
        context.progress(f"the state of step {message['step']} is committed")
    if message["event"] == "waiting":
        context.progress(f"another run on {message['host']} trains this already; waiting for it to end")


def _previews(context: Context, settings: TrainStage, data: SnapshotRecord) -> AbstractContextManager[Previews | None]:
    if settings.previews is None:
        return nullcontext()

    def show(preview: Preview) -> None:
        context.run.artifact(preview.sheet)
        if preview.report is not None:
            scores = {f"preview/{name}": score.value for name, score in preview.report.scores.items()}
            context.run.metrics(scores, preview.step)
        log.info("%s: drawn at step %d: %s", context.stage, preview.step, preview.sheet)

    def tell(text: str) -> None:
        log.warning("%s: %s", context.stage, text)

    home = context.home / "previews" / context.stage
    return Previews(context.store, context.digest, home, data, settings.previews, show, tell)


def fitted(
    settings: TrainStage, size: int | None, text_width: int | None, classes: int | None = None
) -> dict[str, Any]:
    """The stage's TrainSettings; sizes that follow its data and its encoder are theirs unless `model` says them."""
    follow = {"text_dim": text_width, "image_size": size, "classes": classes}
    model = {**{name: value for name, value in follow.items() if value is not None}, **settings.model}
    return settings.model_dump(include=set(TrainSettings.model_fields)) | {"model": model}


def _text_width(store: Store, settings: TrainStage, inputs: Inputs) -> int | None:
    """The width that is set, else that of the network whose weights are inherited, else the text encoder's.

    None if the network draws from labels.
    """
    if settings.task == "class":
        return None
    if "text_dim" in settings.model:
        return int(settings.model["text_dim"])
    if "start_from" in inputs:
        start = checkpoint_of(store, inputs["start_from"])
        return int(json.loads(get_data(store, start.files["config.json"]))["model"]["text_dim"])
    if "encoders" in inputs:
        config = inputs["encoders"].of(EncodersOutput).text["config.json"]
        return int(json.loads(get_data(store, config))["hidden_size"])
    return known(settings.text_encoder).width


def _log_lineage(context: Context, settings: Settings, data: SnapshotRecord, key: str) -> None:
    context.run.params(_flat(settings.results()))
    url = f"{context.store.url}/{key}"
    context.run.dataset(f"snapshot-{data.size}", data.digest(), url, {"rows": data.rows}, "training")


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _flat(inner, f"{path}{key}.") if isinstance(inner, dict) else {f"{path}{key}": inner}
    return leaves


KINDS = (
    StageKind("encoders", EncodersStage, encoders, takes={"captions": "snapshot"}),
    StageKind(
        "train",
        TrainStage,
        train,
        format=2,  # in which the lanes' windows are staggered, and the noise is drawn in another way
        check=check_train,
        takes={"data": "snapshot", "start_from": "train", "encoders": "encoders"},
        needs=lambda settings: Needs(settings.workers, 1, {"cpu": 0.0, "gpu": 1.0, "auto": None}[settings.device]),
    ),
)

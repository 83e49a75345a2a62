"""A recipe's training stages, and the shards that they read, as `training.plan` counts them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_prep.images.sizes import Buckets
from data_prep.prepare.plan import BYTES_PER_PIXEL, PrepareSettings
from infra.config import Settings, parse
from infra.errors import CheckpointError, SettingsError
from pipelines.stages.data import CorpusStage, source_references
from pipelines.stages.fitting import classes_of, has_text, size_of, text_encoder
from pipelines.stages.train import EncodersStage, TrainStage, fitted
from training.encoders.hub import split
from training.encoders.known import config_of
from training.encoders.shapes import (
    NO_TEXT,
    PUBLISHED_TEXT,
    PUBLISHED_VISION,
    LpipsShape,
    TextShape,
    VisionShape,
    text_shape,
    tiny_text,
    tiny_vision,
    vision_shape,
)
from training.plan.machines import Machines
from training.plan.stage import Rates, StagePlan
from training.plan.work import Encoders
from training.settings import TrainSettings

S = TypeVar("S")


def plans(stages: Mapping[str, Settings], machines: Machines, rates: Rates) -> list[StagePlan]:
    """One for each training stage; raises if there is none, or if one cannot be trained on so many ranks."""
    training = {name: settings for name, settings in stages.items() if isinstance(settings, TrainStage)}
    if not training:
        raise SettingsError("the recipe trains nothing", remedy="name a recipe with a stage of kind `train`")
    return [_plan(name, settings, stages, machines, rates) for name, settings in training.items()]


def _plan(
    name: str, settings: TrainStage, stages: Mapping[str, Settings], machines: Machines, rates: Rates
) -> StagePlan:
    text, data = _text(name, settings, stages), stages.get(settings.data)
    own = fitted(settings, size_of(data), text.width or None, classes_of(data))
    try:
        on_these = parse(TrainSettings, own | {"workers": machines.ranks})
    except SettingsError as error:
        raise SettingsError(
            f"`{name}` cannot be trained on {machines}: {error.message}",
            remedy=f"take another number, or change it with --set {name}.batch=N or --set {name}.micro_batch=N",
        ) from None
    vision = _vision(settings, stages) if settings.objective.sees else None
    lpips = LpipsShape() if settings.objective.perceptual.lpips else None
    encoders = Encoders(text, vision, settings.train_text, settings.encoder_precision == "bf16", lpips)
    return StagePlan(name, on_these, encoders, machines, rates, has_text(settings, stages))


def _text(name: str, settings: TrainStage, stages: Mapping[str, Settings]) -> TextShape:
    if settings.task == "class":
        return NO_TEXT
    _, source = text_encoder(name, settings, stages)
    if isinstance(source, EncodersStage):
        return tiny_text(**source.text.model_dump())
    return _published(PUBLISHED_TEXT, source) or _shape(source, text_shape)


def _vision(settings: TrainStage, stages: Mapping[str, Settings]) -> VisionShape:
    stage = stages.get(settings.encoders or "")
    if isinstance(stage, EncodersStage):
        return tiny_vision(**stage.vision.model_dump(exclude={"heads"}))
    source = settings.vision_encoder
    return _published(PUBLISHED_VISION, source) or _shape(source, vision_shape)


def _published(shapes: Mapping[str, S], source: str) -> S | None:
    """A published encoder's shape, which is the same at each of its revisions."""
    return None if Path(source).exists() else shapes.get(split(source)[0])


def _shape(source: str, read: Callable[[Mapping[str, Any]], S]) -> S:
    path = config_of(source)
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source} cannot be planned with: its config.json tells no size of it ({type(error).__name__}: {error})",
            remedy=f"name a Qwen3 or a DINOv2, such as {', '.join([*PUBLISHED_TEXT, *PUBLISHED_VISION])}",
        ) from None


class Shards(NamedTuple):
    """What a stage of kind `prepare` will store: an estimate from the pixels, as its shards are planned by it."""

    stage: str
    images: int
    sizes: dict[str, float]  # size -> bytes

    @property
    def size(self) -> float:
        return sum(self.sizes.values())


def shards(stages: Mapping[str, Settings], images: int | None) -> Iterator[Shards]:
    """For each stage that prepares, if it is known how many images: from `images`, or from the corpus that it reads."""
    for name, settings in stages.items():
        if isinstance(settings, PrepareSettings) and (count := images or _counted(settings, stages)):
            per_pixel = BYTES_PER_PIXEL[settings.format]
            sides = [(s.name, s.side) if isinstance(s, Buckets) else (str(s), s) for s in settings.sizes]
            yield Shards(name, count, {label: count * side**2 * per_pixel for label, side in sides})


def _counted(settings: PrepareSettings, stages: Mapping[str, Settings]) -> int:
    """The images of its corpora, if a stage of the recipe makes all of them."""
    corpora = [stages.get(target) for target in source_references(settings).values()]
    counts = [corpus.count for corpus in corpora if isinstance(corpus, CorpusStage)]
    return sum(counts) if len(counts) == len(settings.sources) else 0

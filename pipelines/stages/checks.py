"""What is wrong between stages, told before any of them runs: each function looks at one stage's settings beside those
of the stages that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from data_prep.snapshots import foresee
from infra.config import nearest
from infra.problems import Wrong
from pipelines.evaluation.prompts import TASKS
from training.model import outline
from training.model.fit import shapes
from training.model.presets import ModelConfig

if TYPE_CHECKING:
    from pipelines.stages.kinds import GateStage, ScoreStage, SnapshotStage, TrainStage

Below = Mapping[str, Any]  # `data` or `scored.0` -> the settings of the stage that it names, which is of the right kind


def score(settings: ScoreStage, below: Below) -> Iterator[Wrong]:
    yield from foresee.size(settings.size, settings.shards, below["shards"])


def snapshot(settings: SnapshotStage, below: Below) -> Iterator[Wrong]:
    yield from foresee.size(settings.size, settings.shards, below["shards"])
    scorers = [below[f"scored.{number}"].scorer for number in range(len(settings.scored))]
    yield from foresee.snapshot(settings, below["shards"], scorers)


def train(settings: TrainStage, below: Below) -> Iterator[Wrong]:
    """Encoders and sizes are looked at in pipelines.stages.fitting, which may have to ask a hub."""
    size = below["data"].size
    if isinstance(size, str):
        yield Wrong(
            "data",
            f"names `{settings.data}`, whose images are of the several sizes of `{size}`",
            "train on a square size: buckets can be prepared, but not trained on yet",
        )
    if settings.start_from is not None:
        yield from _other_network(settings.start_from, below["start_from"], settings)


def _other_network(start: str, before: TrainStage, settings: TrainStage) -> Iterator[Wrong]:
    theirs, ours = before.network(), settings.network()
    if not ("text_dim" in before.model and "text_dim" in settings.model):  # it follows the encoder
        ours = ours.model_copy(update={"text_dim": theirs.text_dim})
    if shapes(outline(theirs).state_dict()) == shapes(outline(ours).state_dict()):
        return
    # What differs and decides a shape; neither the size of images nor how training begins does.
    names = [name for name in ModelConfig.model_fields if name not in ("image_size", "fixed_grid", "open_gates")]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    said = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
    yield Wrong(
        "model",
        f"is another network than that of `{start}`, whose weights it starts from ({', '.join(said)})",
        "give both stages the same preset and model",
    )


def gate(settings: GateStage, below: Below) -> Iterator[Wrong]:
    scores = [f"geneval/{name}" for name in (*TASKS, "overall")]
    for number, rule in enumerate(settings.rules):
        if rule.above is not None and rule.above not in settings.scores:
            near = nearest(rule.above, settings.scores)
            yield Wrong(
                f"rules.{number}.above",
                f"names `{rule.above}`, which is not among the gate's scores",
                f"did you mean `{near}`?" if near else f"name one of {', '.join(settings.scores)}",
            )
        if rule.score not in scores:
            near = nearest(rule.score, scores)
            yield Wrong(
                f"rules.{number}.score",
                f"is {rule.score}, which no evaluation has",
                f"did you mean {near}?" if near else f"known: {', '.join(scores)}",
            )

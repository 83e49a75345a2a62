"""Whether a recipe's training stages fit their encoders and their data, checked before any work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.config import Settings, parse
from infra.errors import PixnerdError, SettingsError
from pipelines.stages.data import SnapshotStage
from pipelines.stages.train import EncodersStage, TrainStage, fitted
from training.encoders import lpips
from training.encoders.known import Known, known
from training.settings import TrainSettings

# The remedy where a published encoder cannot be had.
_SMALL = "or let `{stage}.encoders` name a stage of kind `encoders`: its small ones need no hub and suit `preset: tiny`"


def check_training(stages: Mapping[str, Settings], todo: Iterable[str]) -> None:
    """Refuse stages that cannot be trained with their settings; `todo` are those that will run.

    Their encoders are looked up where they will be loaded from, so this may ask the hub once, which takes seconds.
    """
    for name in todo:
        settings = stages[name]
        if isinstance(settings, TrainStage):
            _check_network(name, settings, stages, _text_width(name, settings, stages))
            if settings.objective.sees and settings.encoders is None:
                _check_vision(name, settings)
            if settings.objective.perceptual.lpips and settings.lpips is not None:
                _check_lpips(name, settings.lpips)


def _check_network(name: str, settings: TrainStage, stages: Mapping[str, Settings], width: int) -> None:
    size = size_of(stages.get(settings.data))
    set_size, set_width = (settings.model.get(field) for field in ("image_size", "text_dim"))
    if size is not None and set_size not in (None, size):
        raise SettingsError(
            f"`{name}.model.image_size` is {set_size}, but the images of `{settings.data}` are of size {size}",
            remedy="leave model.image_size out: it follows the data; or name other data",
        )
    if set_width not in (None, width):
        raise SettingsError(
            f"`{name}.model.text_dim` is {set_width}, but the text encoder's features are {width} wide",
            remedy="leave model.text_dim out: it follows the encoder; or name another encoder",
        )
    parse(TrainSettings, fitted(settings, size, width), where=name)


def size_of(data: Settings | None) -> int | None:
    return data.size if isinstance(data, SnapshotStage) and isinstance(data.size, int) else None


def _text_width(name: str, settings: TrainStage, stages: Mapping[str, Settings]) -> int:
    """The width of the text encoder's features."""
    stage, source = text_encoder(name, settings, stages)
    if isinstance(source, EncodersStage):
        return source.text.hidden
    return _known(stage, "text", source, _SMALL.format(stage=stage)).width


def text_encoder(name: str, settings: TrainStage, stages: Mapping[str, Settings]) -> tuple[str, EncodersStage | str]:
    """A stage's text encoder, and the stage that says so: one inherited with the weights, another's, or a published."""
    above = stages.get(settings.start_from or "")
    if isinstance(above, TrainStage) and has_text(above, stages):
        return text_encoder(str(settings.start_from), above, stages)
    encoders = stages.get(settings.encoders or "")
    return name, encoders if isinstance(encoders, EncodersStage) else settings.text_encoder


def has_text(settings: TrainStage, stages: Mapping[str, Settings]) -> bool:
    """Whether a stage's checkpoint holds its text encoder; a stage that starts from it then inherits that one."""
    above = stages.get(settings.start_from or "")
    own = settings.encoders is not None or settings.train_text > 0 or Path(settings.text_encoder).exists()
    return own or (isinstance(above, TrainStage) and has_text(above, stages))


def _check_vision(name: str, settings: TrainStage) -> None:
    needs = "repa" if settings.objective.repa else "perceptual.dino"
    ways = f"or set `{name}.objective.{needs}` to 0, {_SMALL.format(stage=name)}"
    if _known(name, "vision", settings.vision_encoder, ways).patch_size is None:
        raise SettingsError(
            f"`{name}.vision_encoder` is {settings.vision_encoder}, which has no patches: it is no image encoder",
            remedy="name a DINOv2 of transformers' format",
        )


def _check_lpips(name: str, source: str) -> None:
    """A folder's tensors are read; of a hub's repository only the form of its name is looked at."""
    try:
        if Path(source).is_dir():
            lpips.read(source)
        elif not lpips.HUB_NAME.fullmatch(source):
            raise SettingsError(f"there is no folder {source}", remedy=lpips.REMEDY)
    except PixnerdError as error:
        raise type(error)(f"`{name}.lpips`: {error.message}", remedy=error.remedy) from None


def _known(name: str, what: str, source: str, ways: str) -> Known:
    try:
        return known(source)
    except PixnerdError as error:
        raise type(error)(
            f"`{name}` cannot have its {what} encoder {source}: {error.message}", remedy=f"{error.remedy}, {ways}"
        ) from None

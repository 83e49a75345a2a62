"""Whether a recipe's training stages fit their encoders and their data, checked before any work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.images.sizes import Buckets
from data_prep.prepare.plan import PrepareSettings
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
            width = _text_width(name, settings, stages) if settings.task == "text" else None
            _check_network(name, settings, stages, width)
            _check_buckets(name, settings, stages)
            if settings.objective.sees and settings.encoders is None:
                _check_vision(name, settings)
            if settings.objective.perceptual.lpips and settings.lpips is not None:
                _check_lpips(name, settings.lpips)


def _check_network(name: str, settings: TrainStage, stages: Mapping[str, Settings], width: int | None) -> None:
    data = stages.get(settings.data)
    size = size_of(data)
    set_size, set_width = (settings.model.get(field) for field in ("image_size", "text_dim"))
    if size is not None and set_size not in (None, size):
        raise SettingsError(
            f"`{name}.model.image_size` is {set_size}, but the images of `{settings.data}` are of size {size}",
            remedy="leave model.image_size out: it follows the data; or name other data",
        )
    if width is not None and set_width not in (None, width):
        raise SettingsError(
            f"`{name}.model.text_dim` is {set_width}, but the text encoder's features are {width} wide",
            remedy="leave model.text_dim out: it follows the encoder; or name another encoder",
        )
    above = stages.get(settings.start_from or "")
    if isinstance(above, TrainStage) and (theirs := classes_of(stages.get(above.data))) != classes_of(data):
        raise SettingsError(
            f"`{name}` starts from the weights of `{settings.start_from}`, which has {theirs} classes, "
            f"but `{settings.data}` {classes_of(data)}",
            remedy="give both snapshots the same labels.classes",
        )
    parse(TrainSettings, fitted(settings, size, width, classes_of(data)), where=name)


def _check_buckets(name: str, settings: TrainStage, stages: Mapping[str, Settings]) -> None:
    """Images of several sizes must be made of whole patches, of as many as a square of the trained size has."""
    buckets, network = _buckets(settings, stages), settings.network()
    if buckets is None:
        return
    if network.image_size != buckets.side:
        raise SettingsError(
            f"`{name}.model.image_size` is {network.image_size}, but the buckets of `{settings.data}` have as many "
            f"pixels as a square of {buckets.side}",
            remedy=f"set {name}.model.image_size to {buckets.side}",
        )
    if network.fixed_grid or buckets.step % network.patch_size:
        why = "a fixed grid is square" if network.fixed_grid else f"its patches have a side of {network.patch_size}"
        raise SettingsError(
            f"`{name}` cannot be trained on buckets with a step of {buckets.step}: {why}",
            remedy="leave model.fixed_grid out, and prepare buckets whose `step` is a multiple of model.patch_size",
        )


def _buckets(settings: TrainStage, stages: Mapping[str, Settings]) -> Buckets | None:
    data = stages.get(settings.data)
    prepared = stages.get(data.shards) if isinstance(data, SnapshotStage) else None
    sizes = prepared.sizes if isinstance(prepared, PrepareSettings) else []
    of_data = [s for s in sizes if isinstance(s, Buckets) and isinstance(data, SnapshotStage) and s.name == data.size]
    return of_data[0] if of_data else None


def classes_of(data: Settings | None) -> int | None:
    return data.labels.classes if isinstance(data, SnapshotStage) and data.labels is not None else None


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
    if settings.task == "class":
        return False
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

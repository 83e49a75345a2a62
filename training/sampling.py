"""Draws pictures with the network of a checkpoint folder, from prompts or labels and seeds.

One picture never depends on the others: its noise comes from its seed alone, and each caption is encoded by itself.
Batch size, device and compiling only change the order in which sums are taken, so they change a pixel by one grey level
at most, and almost always not at all; the same batches on the same machine give the same bytes.

Shapes: B images, H height, W width, R captions, T text tokens, E text features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, field_validator
from torch import Tensor

from infra.config import Refused, Settings, operational, parse
from infra.errors import CheckpointError, SettingsError
from training import model as models
from training.diffusion.prediction import as_velocity
from training.diffusion.samplers import Watch, guided, noise_for, solver, timesteps, to_uint8
from training.encoders.text import TextEncoder
from training.model.compiled import compile_network
from training.model.condition import Condition, Text
from training.model.pixnerd import PixNerd
from training.model.presets import ModelConfig

Pictures = npt.NDArray[np.uint8]  # [B, H, W, 3]
Size = tuple[int, int]  # height, width

Precision = Literal["fp32", "bf16"]
_SIZES = TypeAdapter(list[tuple[PositiveInt, PositiveInt]])
PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SampleSettings(Settings):
    """The class's defaults are those of text to image; `defaults` gives those of a checkpoint."""

    steps: int = Field(25, ge=1)
    solver: str = "adams2"
    guidance: float = Field(4.0, ge=0, allow_inf_nan=False, description="1: none")
    interval: tuple[float, float] = Field((0.0, 1.0), description="times between which guidance applies, both excluded")
    shift: float = Field(3.0, gt=0, allow_inf_nan=False, description="above 1: more of the steps on noisy images")
    size: tuple[PositiveInt, PositiveInt] | None = Field(None, description="height, width; none: the trained size")
    precision: Precision | None = Field(
        None, description="of the network's weights and activations; none: bf16 if the checkpoint is, else fp32"
    )
    batch: int = operational(32, ge=1, description="images at once")
    compile: bool = operational(False, description="let torch.compile build the network: minutes first, then faster")

    @field_validator("solver")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            solver(name)
        except SettingsError as error:
            raise Refused(error.message, remedy=error.remedy) from None
        return name

    @field_validator("interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError("the interval must be two times between 0 and 1, the earlier one first")
        return interval


_DEFAULTS = {"text": SampleSettings(), "class": SampleSettings(steps=50, guidance=3.5, interval=(0.1, 1.0), shift=1.0)}


def defaults(folder: Path, changes: Mapping[str, Any] | None = None) -> SampleSettings:
    """A checkpoint's sampling settings: its task's defaults, then `sampling` of its `extra`, then the changes."""
    config, extra = models.read_config(folder)
    settings = _DEFAULTS[config.task].model_dump()
    if "sampling" in extra:
        try:
            settings |= parse(SampleSettings, extra["sampling"]).model_dump(exclude_unset=True)
        except SettingsError as error:
            raise CheckpointError(
                f"{folder}: extra.sampling of its config.json: {error.message}", remedy=error.remedy
            ) from None
    return parse(SampleSettings, settings | dict(changes or {}))


def buckets(folder: Path, extra: Mapping[str, Any]) -> list[Size]:
    """The sizes that a network was trained on, if there were several."""
    try:
        return _SIZES.validate_python(extra.get("buckets", []))
    except ValidationError:
        raise CheckpointError(
            f"{folder}: extra.buckets of its config.json is not a list of heights and widths",
            remedy="correct it, or remove it: other sizes than the square one are then drawn with larger patches",
        ) from None


def sized(config: ModelConfig, size: Size | None, buckets: Sequence[Size] = ()) -> tuple[ModelConfig, Size]:
    """The config with which a network draws pictures of that size, and the size (None: the trained one).

    At another size than those it was trained at, a network with a field keeps its grid and draws larger or smaller
    patches. If the trained size is not known, a square size is taken for it.
    """
    trained = config.image_size
    if trained is None:
        if size is None or size[0] != size[1]:
            asked = "no size was asked for" if size is None else f"a {size[0]}x{size[1]} image needs it"
            raise SettingsError(
                f"the size that this checkpoint was trained at is not known, and {asked}",
                remedy="import it again with --trained-size N, or ask for a square of that size",
            )
        config.check_size(*size)
        trained = size[0]
        config = config.model_copy(update={"image_size": trained})
    size = size or (trained, trained)
    if size != (trained, trained) and size not in buckets and config.field_blocks:
        config = config.model_copy(update={"fixed_grid": True})
    config.check_size(*size)
    return config, size


def resolved(folder: Path, settings: SampleSettings) -> SampleSettings:
    """The settings with size and precision filled in from the checkpoint; no weights are read."""
    config, extra = models.read_config(folder)
    _, size = sized(config, settings.size, buckets(folder, extra))
    precision = settings.precision or _saved_precision(folder, config)
    return settings.model_copy(update={"size": size, "precision": precision})


def _saved_precision(folder: Path, config: ModelConfig) -> Precision:
    """bf16 if all weights are, else fp32: fp16 is slow or missing on a CPU, and no network needs float64."""
    dtypes = {stored.dtype for stored in models.read_header(folder, config).values()}
    return "bf16" if dtypes == {"BF16"} else "fp32"


class Artist:
    """A network that draws pictures, with its text encoder if it draws from prompts."""

    def __init__(self, net: PixNerd, text: TextEncoder | None = None, buckets: Sequence[Size] = ()) -> None:
        assert (text is None) == (net.config.task == "class")
        self.net, self.text = net.eval(), None if text is None else text.eval()
        self.device, self._buckets = next(net.parameters()).device, buckets
        self._config = net.config  # as it was saved; `net.config` changes with the size that is drawn
        self._encoded: dict[str, Text] = {}  # by prompt, of the last batch
        self._most_images = self._most_texts = 0  # of the largest batch so far or announced by `expect`

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", settings: SampleSettings | None = None) -> Artist:
        """Takes size, precision and compiling from the settings, where None leaves them to the checkpoint."""
        settings = settings or SampleSettings()
        config, extra = models.read_config(folder)
        source = encoder_source(folder, extra) if config.task == "text" else None
        net = models.load(folder, device=device)
        net.to(PRECISIONS[settings.precision or _saved_precision(folder, config)])
        text = None
        if source is not None:
            models.check_files(folder, "text")
            text = TextEncoder(source, config.text_tokens, rounded=config.round_text).to(device)
            if text.width != config.text_dim:
                raise CheckpointError(
                    f"the text encoder {source} makes features of {text.width}, {folder} needs {config.text_dim}",
                    remedy="name the encoder that it was trained with in config.json's extra",
                )
        artist = cls(net, text, trained_on := buckets(folder, extra))
        net.config, _ = sized(config, settings.size, trained_on)
        if settings.compile:
            compile_network(net, replay=True)
        return artist

    def draw(self, subjects: Sequence[str | int], seeds: Sequence[int], settings: SampleSettings) -> Pictures:
        """Picture i shows subject i (a prompt or label) from seed i; `settings.batch` of them are drawn at once."""
        assert len(subjects) == len(seeds)
        batches = [slice(start, start + settings.batch) for start in range(0, len(subjects), settings.batch)]
        self.expect([subjects[batch] for batch in batches])
        return np.concatenate([self.batch(subjects[batch], seeds[batch], settings) for batch in batches])

    def expect(self, batches: Iterable[Sequence[str | int]]) -> None:
        """Announces batches: a compiled network pads each one to the size of the largest, to be compiled only once."""
        for subjects in batches:
            self._most_images = max(self._most_images, len(subjects))
            self._most_texts = max(self._most_texts, len(set(subjects)))

    def batch(
        self, subjects: Sequence[str | int], seeds: Sequence[int], settings: SampleSettings, watch: Watch | None = None
    ) -> Pictures:
        """Draws all of them at once; `watch` gets the number of each step and x [B, 3, H, W] after it."""
        x_BCHW = self.solve(subjects, seeds, settings, watch)
        check_finite(x_BCHW, subjects, seeds)
        return pixels(x_BCHW)

    @torch.no_grad()
    def solve(
        self, subjects: Sequence[str | int], seeds: Sequence[int], settings: SampleSettings, watch: Watch | None = None
    ) -> Tensor:
        """What `batch` makes pictures of: x [B, 3, H, W], which may be NaN or infinite."""
        assert settings.precision is None or PRECISIONS[settings.precision] == self.net.stem.weight.dtype
        config, (height, width) = sized(self._config, settings.size, self._buckets)
        if config != self.net.config:  # a new object, even an equal one, would have the network compiled again
            self.net.config = config
        subjects, seeds, wanted = list(subjects), list(seeds), len(seeds)
        if settings.compile:
            # Another shape would be compiled for minutes, so a smaller batch is padded with its last picture.
            self.expect([subjects])
            subjects += subjects[-1:] * (self._most_images - wanted)
            seeds += seeds[-1:] * (self._most_images - wanted)

        def watch_wanted(step: int, x_BCHW: Tensor) -> None:
            if watch is not None:
                watch(step, x_BCHW[:wanted])

        with _enough_memory(len(seeds), height, width, self.device):
            noise_BCHW = torch.stack([noise_for(seed, (3, height, width)) for seed in seeds]).to(self.device)
            x_BCHW = self._config.noise_scale * noise_BCHW
            condition, empty = self._conditions(subjects, settings.compile)
            velocity = guided(as_velocity(self.net), condition, empty, settings.guidance, settings.interval)
            x_BCHW = solver(settings.solver)(velocity, x_BCHW, timesteps(settings.steps, settings.shift), watch_wanted)
        return x_BCHW[:wanted]

    def _conditions(self, subjects: Sequence[str | int], pad: bool) -> tuple[Condition, Condition]:
        """The subjects' condition, and the empty one for guidance: the empty caption, or the label of no class."""
        if self.text is None:
            if isinstance(subjects[0], str):
                raise CheckpointError("this network draws from labels, not from prompts", remedy="name another one")
            return (
                torch.tensor(subjects, device=self.device),
                torch.tensor([self._config.classes], device=self.device),
            )
        distinct = [str(prompt) for prompt in dict.fromkeys(subjects)]
        # Pictures of one prompt follow each other, so only the last batch's prompts may be needed again.
        self._encoded = {prompt: self._encode(prompt) for prompt in {"", *distinct}}
        if pad:
            distinct += distinct[-1:] * (self._most_texts - len(distinct))
        texts_R = [self._encoded[prompt] for prompt in distinct]
        features_RTE = torch.cat([text.features_RTE for text in texts_R])
        masks_R1T = [text.mask_RT for text in texts_R if text.mask_RT is not None]
        rows_B = torch.tensor([distinct.index(str(prompt)) for prompt in subjects], device=self.device)
        return Text(features_RTE, torch.cat(masks_R1T) if masks_R1T else None, rows_B), self._encoded[""]

    def _encode(self, prompt: str) -> Text:
        """Encoded alone: other captions in the batch would change its last bits, and so those of a resumed call."""
        assert self.text is not None
        return self._encoded[prompt] if prompt in self._encoded else self.text.encode([prompt])

    def too_long(self, prompts: Sequence[str]) -> dict[str, int]:
        """The prompts that are truncated for the network, each with its number of tokens."""
        if self.text is None or not prompts:
            return {}
        ids = self.text.tokenizer(list(prompts), verbose=False)["input_ids"]
        return {prompt: len(row) for prompt, row in zip(prompts, ids, strict=True) if len(row) > self.text.tokens}


def check_finite(x_BCHW: Tensor, subjects: Sequence[str | int], seeds: Sequence[int]) -> None:
    """Raises if a picture is not finite; in 8 bits NaN would only be black."""
    for index, finite in enumerate(x_BCHW.isfinite().flatten(1).all(1).tolist()):
        if not finite:
            raise CheckpointError(
                f"{subjects[index]!r} from seed {seeds[index]} came out as NaN or infinity, which is no picture",
                remedy="use shift, guidance and steps nearer to the defaults, or precision fp32; "
                "if that does not help, the weights are damaged",
            )


def pixels(x_BCHW: Tensor) -> Pictures:
    """What a solver returned as pictures."""
    return cast(Pictures, to_uint8(x_BCHW).permute(0, 2, 3, 1).contiguous().cpu().numpy())


def encoder_source(folder: Path, extra: Mapping[str, Any]) -> Path | str:
    """A checkpoint's text encoder: its folder `text`, or the name or path that `extra` tells."""
    name = extra.get("text_encoder")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{folder} does not say which text encoder it needs",
            remedy="import it again with --text-encoder, or write `text_encoder` into config.json's extra",
        )
    if name != "text":
        return name
    if not (folder / "text" / "config.json").is_file():
        raise CheckpointError(
            f"{folder} lacks its text encoder, the folder text", remedy="name the folder of a whole checkpoint"
        )
    return folder / "text"


@contextmanager
def _enough_memory(images: int, height: int, width: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the CPU allocator raises no more specific class
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        smaller = f"a batch below {images}" if images > 1 else "a smaller size, or precision bf16"
        raise SettingsError(
            f"{device} has too little memory for {images} images of {height}x{width} at once",
            remedy=f"ask for {smaller}",
        ) from None

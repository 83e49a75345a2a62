"""What a run is built from: the files of its encoders and of the weights that it starts from, and networks of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from infra.errors import SettingsError
from training import checkpoint
from training import model as models
from training.diffusion.settings import ObjectiveSettings
from training.encoders import hub, lpips
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.job import Files, Job
from training.model.pixnerd import PixNerd
from training.model.presets import ModelConfig
from training.model.repa_head import RepaHead
from training.perceptual import perceptual_losses
from training.settings import TrainSettings
from training.step import Trained


@dataclass
class Origins:
    """What a network and its encoders are made from, as it lies on this machine."""

    start: Path | None  # the checkpoint whose EMA weights are inherited
    text: Path | str | None  # a folder, or the name of a published encoder; None if the condition is labels
    vision: Path | str | None
    lpips: str | None


def fetch(job: Job, folder: Path, on_one_rank: Callable[[Callable[[], str]], str] = lambda work: work()) -> Origins:
    """Models of the hub are named by commit, which one rank asks for and tells the others: else they might differ."""
    start = checkpoint.fetch(job.store, job.start_from, folder / "start") if job.start_from is not None else None

    def local(encoder: Files | str, name: str) -> Path | str:
        if isinstance(encoder, dict):
            return checkpoint.fetch_files(job.store, encoder, folder / name)
        return Path(encoder) if Path(encoder).exists() else on_one_rank(partial(hub.pinned, encoder))

    text: Path | str | None = None
    if job.settings.network().task == "text":
        inherited = start / "text" if start is not None and (start / "text").exists() else None
        text = inherited or local(job.text, "text")
    objective = job.settings.objective
    _check_named(job, objective)
    vision = local(job.vision, "vision") if objective.sees and job.vision is not None else None
    source = job.lpips if objective.perceptual.lpips else None
    return Origins(start, text, vision, on_one_rank(partial(lpips.pinned, source)) if source is not None else None)


def _check_named(job: Job, objective: ObjectiveSettings) -> None:
    if objective.sees and job.vision is None:
        what = "objective.repa" if objective.repa else "objective.perceptual.dino"
        raise SettingsError(f"{what} needs a vision encoder", remedy=f"name one, or set {what} to 0")
    if objective.perceptual.lpips and job.lpips is None:
        raise SettingsError("objective.perceptual.lpips needs its weights", remedy="name them, or set it to 0")


@dataclass
class Networks:
    trained: Trained
    text: TextEncoder | None
    vision: VisionEncoder | None

    @property
    def frozen_text(self) -> TextEncoder | None:
        return self.text if self.trained.text is None else None


def build(settings: TrainSettings, origins: Origins) -> Networks:
    """The denoiser, initialised from the seed or from another run's checkpoint, and its encoders."""
    torch.manual_seed(settings.seed)
    net, objective = PixNerd(settings.network()), settings.objective
    if origins.start is not None:
        checkpoint.load_part(origins.start / models.WEIGHTS, net, "the network")
    frozen = torch.bfloat16 if settings.encoder_precision == "bf16" else torch.float32
    text = _text_encoder(settings, net.config, origins.text, frozen) if origins.text is not None else None
    vision = VisionEncoder(origins.vision, dtype=frozen) if origins.vision is not None else None
    head = RepaHead(net.config.hidden, vision.width) if vision is not None and objective.repa else None
    if head is not None and origins.start is not None and (origins.start / models.HEAD).exists():
        checkpoint.load_part(origins.start / models.HEAD, head, "the REPA head")
    perceptual = perceptual_losses(objective.perceptual, origins.lpips, vision)
    trained = Trained(net, head, text if settings.train_text else None, objective, perceptual)
    return Networks(trained, text, vision)


def _text_encoder(settings: TrainSettings, config: ModelConfig, source: Path | str, frozen: torch.dtype) -> TextEncoder:
    text = TextEncoder(
        source,
        config.text_tokens,
        dtype=torch.float32 if settings.train_text else frozen,
        train_layers=settings.train_text,
        rounded=config.round_text,
        needed=config.text_padding if settings.pack_text else None,
    )
    if text.width != config.text_dim:
        raise SettingsError(
            f"the text encoder's features are {text.width} wide, the network expects {config.text_dim}",
            remedy=f"set model.text_dim to {text.width}, or name another encoder",
        )
    return text

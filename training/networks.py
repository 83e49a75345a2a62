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
from training.encoders import hub, lpips
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.job import Files, Job
from training.model.pixnerd import PixNerd
from training.model.repa_head import RepaHead
from training.perceptual import perceptual_losses
from training.settings import TrainSettings
from training.step import Trained


@dataclass
class Origins:
    """What a network and its encoders are made from, as it lies on this machine."""

    start: Path | None  # the checkpoint whose EMA weights are inherited
    text: Path | str  # a folder, or the name of a published encoder
    vision: Path | str | None
    lpips: str | None


def fetch(job: Job, folder: Path, on_one_rank: Callable[[Callable[[], str]], str] = lambda work: work()) -> Origins:
    """Models of the hub are named by commit, which one rank asks for and tells the others: else they might differ."""
    start = checkpoint.fetch(job.store, job.start_from, folder / "start") if job.start_from is not None else None

    def local(encoder: Files | str, name: str) -> Path | str:
        if isinstance(encoder, dict):
            return checkpoint.fetch_files(job.store, encoder, folder / name)
        return Path(encoder) if Path(encoder).exists() else on_one_rank(partial(hub.pinned, encoder))

    inherited = start / "text" if start is not None and (start / "text").exists() else None
    text = inherited or local(job.text, "text")
    objective = job.settings.objective
    if objective.sees and job.vision is None:
        what = "objective.repa" if objective.repa else "objective.perceptual.dino"
        raise SettingsError(f"{what} needs a vision encoder", remedy=f"name one, or set {what} to 0")
    if objective.perceptual.lpips and job.lpips is None:
        raise SettingsError("objective.perceptual.lpips needs its weights", remedy="name them, or set it to 0")
    vision = local(job.vision, "vision") if objective.sees and job.vision is not None else None
    source = job.lpips if objective.perceptual.lpips else None
    return Origins(start, text, vision, on_one_rank(partial(lpips.pinned, source)) if source is not None else None)


@dataclass
class Networks:
    trained: Trained
    text: TextEncoder
    vision: VisionEncoder | None

    @property
    def frozen_text(self) -> TextEncoder | None:
        return self.text if self.trained.text is None else None


def build(settings: TrainSettings, origins: Origins) -> Networks:
    """The denoiser, initialised from the seed or from another run's checkpoint, and its encoders."""
    torch.manual_seed(settings.seed)
    net = PixNerd(settings.network())
    if origins.start is not None:
        checkpoint.load_part(origins.start / models.WEIGHTS, net, "the network")
    frozen = torch.bfloat16 if settings.encoder_precision == "bf16" else torch.float32
    text = TextEncoder(
        origins.text,
        net.config.text_tokens,
        dtype=torch.float32 if settings.train_text else frozen,
        train_layers=settings.train_text,
        rounded=net.config.round_text,
        needed=net.config.text_padding if settings.pack_text else None,
    )
    if text.width != net.config.text_dim:
        raise SettingsError(
            f"the text encoder's features are {text.width} wide, the network expects {net.config.text_dim}",
            remedy=f"set model.text_dim to {text.width}, or name another encoder",
        )
    objective = settings.objective
    vision = VisionEncoder(origins.vision, dtype=frozen) if origins.vision is not None else None
    head = RepaHead(net.config.hidden, vision.width) if vision is not None and objective.repa else None
    if head is not None and origins.start is not None and (origins.start / models.HEAD).exists():
        checkpoint.load_part(origins.start / models.HEAD, head, "the REPA head")
    perceptual = perceptual_losses(objective.perceptual, origins.lpips, vision, (net.config.grid,) * 2)
    trained = Trained(net, head, text if settings.train_text else None, objective, perceptual)
    return Networks(trained, text, vision)

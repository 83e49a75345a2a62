"""How well a rank's device is used: the FLOP that training is known to need, against what the device can do."""

from __future__ import annotations

import resource
from typing import Any

import torch

from training.encoders.shapes import NO_TEXT, LpipsShape, text_shape, vision_shape
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.engine import Precision
from training.model.presets import ModelConfig
from training.plan.machines import TERA, device_called
from training.plan.work import Encoders, work
from training.settings import TrainSettings

GIB = 2**30


class Perf:
    """`peak` is the FLOP/s of a rank, which the share is told of; without it, as for CPUs, none is told."""

    def __init__(self, flop_per_image: int, peak: float | None, device: torch.device) -> None:
        self.flop_per_image, self.peak, self.device = flop_per_image, peak, device

    def read(self, images_per_second: float, ranks: int) -> dict[str, float]:
        """Figures for a log line, from the speed since the last one; of memory, the most that this rank ever held."""
        rate = images_per_second * self.flop_per_image / ranks
        share = {"perf/mfu": rate / self.peak} if self.peak else {}
        return {"perf/tflops": rate / TERA, **share, "perf/memory_gib": _peak_memory(self.device) / GIB}


def flop_per_image(
    net: ModelConfig, text: TextEncoder | None, vision: VisionEncoder | None, settings: TrainSettings
) -> int:
    """Images of several sizes have about as many pixels as a square of the trained one, which is counted."""
    of_text = text_shape(text.model.config.to_dict()) if text is not None else NO_TEXT
    of_vision = vision_shape(_config(vision)) if vision is not None else None
    lpips = LpipsShape() if settings.objective.perceptual.lpips else None
    encoders = Encoders(of_text, of_vision, settings.train_text, lpips=lpips)
    return work(net, encoders, settings.objective, settings.steps).step


def peak(stated: float, precision: Precision, device: torch.device) -> float | None:
    """FLOP/s of one rank: what the settings say in TFLOP/s, or else what is known of its GPU."""
    if stated:
        return stated * TERA
    if device.type != "cuda":
        return None
    known = device_called(torch.cuda.get_device_name(device))
    return (known.bf16 if precision == "bf16" else known.fp32) if known is not None else None


def _config(vision: VisionEncoder) -> dict[str, Any]:
    config: dict[str, Any] = vision.model.config.to_dict()
    return config


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

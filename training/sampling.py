"""A checkpoint's folder becomes something that draws: prompts and seeds in, pictures out, the same ones every time.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator

from infra.config import Settings, operational
from infra.errors import CheckpointError, SettingsError
from training import model as models
from training.diffusion.samplers import guided, noise_for, solver, timesteps, to_uint8
from training.encoders.text import TextEncoder
from training.model.embed import Text
from training.model.pixnerd import PixNerd


class SampleSettings(Settings):
    steps: int = Field(25, ge=1)
    solver: str = "adams2"
    guidance: float = Field(4.0, ge=0, description="1: none")
    interval: tuple[float, float] = Field((0.0, 1.0), description="times between which guidance applies, both excluded")
    shift: float = Field(3.0, gt=0, description="above 1: more of the steps on noisy images")
    batch: int = operational(32, ge=1, description="images at once")

    @field_validator("solver")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            solver(name)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return name


class Artist:
    """A network and its text encoder, ready to draw."""

    def __init__(self, net: PixNerd, text: TextEncoder) -> None:
        self.net, self.text = net.eval(), text.eval()
        self.device = next(net.parameters()).device

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Artist:
        net = models.load(folder, device=device)
        if net.config.task != "text":
            raise CheckpointError(f"{folder} draws from labels, not from prompts", remedy="name a text-to-image one")
        _, extra = models.read_config(folder)
        return cls(net, text_encoder(folder, extra, net.config.text_tokens).to(device))

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleSettings,
        show: Callable[[int], None] = lambda done: None,
    ) -> npt.NDArray[np.uint8]:
        """Picture i is prompt i from seed i: [B, H, W, 3]. What one looks like does not depend on the others."""
        assert len(prompts) == len(seeds)
        drawn = []
        for start in range(0, len(prompts), settings.batch):
            part = slice(start, start + settings.batch)
            drawn.append(self._batch(prompts[part], seeds[part], settings))
            show(start + len(prompts[part]))
        return np.concatenate(drawn)

    def _batch(self, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings) -> npt.NDArray[np.uint8]:
        side = self.net.config.image_size
        x_BCHW = torch.stack([noise_for(seed, (3, side, side)) for seed in seeds]).to(self.device)
        distinct = list(dict.fromkeys(prompts))
        rows_B = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        words, nothing = self.text.encode(distinct), self.text.encode([""])
        condition = Text(words.features_RTE, words.mask_RT, rows_B)
        velocity = guided(self.net, condition, nothing, settings.guidance, settings.interval)
        x_BCHW = solver(settings.solver)(velocity, x_BCHW, timesteps(settings.steps, settings.shift))
        pictures: npt.NDArray[np.uint8] = to_uint8(x_BCHW).permute(0, 2, 3, 1).cpu().numpy()
        return pictures


def text_encoder(folder: Path, extra: dict[str, Any], tokens: int) -> TextEncoder:
    """The encoder that belongs to a checkpoint: in its own folder if it was trained along, else a published one."""
    name = extra.get("text_encoder")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{folder} does not say which text encoder it needs", remedy="add it to config.json's extra"
        )
    return TextEncoder(folder / "text" if name == "text" else name, tokens)

"""The authors' own code, run from a checkout that whoever runs the bench has fetched; nothing of it lies here.

Only their text-to-image network, their flow-matching trainer and their Adams sampler are imported: these need PyTorch
alone. The trainer that the published recipe names adds REPA to the same step, for which it needs a DINOv2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from infra.errors import SettingsError
from training.model import ModelConfig

NETWORK = "src.models.transformer.pixnerd_t2i"
TRAINER = "src.diffusion.flow_matching.training"
SAMPLER = "src.diffusion.flow_matching.adam_sampling"
SCHEDULE = "src.diffusion.flow_matching.scheduling"
GUIDANCE = "src.diffusion.base.guidance"


class Authors:
    def __init__(self, checkout: Path) -> None:
        file = checkout / (NETWORK.replace(".", "/") + ".py")
        if not file.is_file():
            raise SettingsError(f"{file} is not there", remedy="name the folder of a checkout of the authors' code")
        sys.path.insert(0, str(checkout.resolve()))
        self._network = importlib.import_module(NETWORK)
        self._trainer = importlib.import_module(TRAINER)
        self._sampler = importlib.import_module(SAMPLER)
        self._guidance = importlib.import_module(GUIDANCE)
        self._schedule = importlib.import_module(SCHEDULE).LinearScheduler()

    def network(self, config: ModelConfig) -> nn.Module:
        made: nn.Module = self._network.PixNerDiT(
            in_channels=3,
            num_groups=config.heads,
            hidden_size=config.hidden,
            decoder_hidden_size=config.field_channels,
            num_encoder_blocks=config.blocks,
            num_decoder_blocks=config.field_blocks,
            num_text_blocks=config.text_blocks,
            patch_size=config.patch_size,
            txt_embed_dim=config.text_dim,
            txt_max_length=config.text_tokens,
        )
        return made

    def loss(self, shift: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        """`(net, images, text) -> loss`; times and noise are drawn inside, from PyTorch's own generator."""
        trainer: Any = self._trainer.FlowMatchingTrainer(
            scheduler=self._schedule, lognorm_t=True, timeshift=shift, null_condition_p=0.0
        )

        def loss(net: nn.Module, images_BCHW: Tensor, text_BTE: Tensor) -> Tensor:
            found: Tensor = trainer(net, None, None, images_BCHW, text_BTE, None)["loss"]
            return found

        return loss

    def sample(
        self, steps: int, shift: float, guidance: float, interval: tuple[float, float]
    ) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
        """`(net, noise, text, nothing) -> pictures`, with text for each picture of its own."""
        sampler: Any = self._sampler.AdamLMSampler(
            order=2,
            timeshift=shift,
            guidance_interval_min=interval[0],
            guidance_interval_max=interval[1],
            num_steps=steps,
            guidance=guidance,
            guidance_fn=self._guidance.simple_guidance_fn,
            scheduler=self._schedule,
        )

        def sample(net: nn.Module, noise_BCHW: Tensor, text_BTE: Tensor, nothing_BTE: Tensor) -> Tensor:
            found: Tensor = sampler(net, noise_BCHW, text_BTE, nothing_BTE)
            return found

        return sample

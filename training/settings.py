"""The settings of a training run. Those that are operational change how it runs and not what comes out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from infra.config import Refused, Settings, check, operational
from infra.errors import SettingsError
from training.diffusion.settings import ObjectiveSettings
from training.ema import EmaSettings
from training.encoders.lpips import LEAST_SIDE
from training.engine import Precision, Stage
from training.loader.order import DataSettings
from training.model.presets import ModelConfig, preset, training_settings
from training.optim import OptimSettings
from training.validation import ValidationSettings


class TrainSettings(Settings):
    preset: str = "XXL/16-dct"
    model: dict[str, Any] = Field(default_factory=dict, description="what differs from the preset")
    steps: int = Field(ge=1)
    batch: int = Field(ge=1, description="images a step, over all ranks")
    seed: int = Field(0, ge=0)
    precision: Precision = "bf16"
    optim: OptimSettings = OptimSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    ema: EmaSettings = EmaSettings()
    spike: float = Field(
        0.0, ge=0, description="a loss so many times that of the log lines before is a break; 0: none is"
    )
    returns: int = Field(3, ge=0, description="how often a broken run goes back to its last good state before it ends")
    reading: DataSettings = DataSettings()
    validation: ValidationSettings = ValidationSettings()
    exact_gradients: bool = Field(False, description="with bf16: add the gradients of micro-batches up in fp32")
    train_text: int = Field(0, ge=0, description="layers of the text encoder, from its last, to train along")
    encoder_precision: Precision = Field(
        "fp32", description="what encoders that are not trained compute in; on GPUs choose bf16"
    )
    pack_text: bool = Field(
        False, description="encode no pads that are masked, and the empty caption once; the same but for rounding"
    )

    workers: int = operational(1, ge=1, description="ranks: GPUs, or processes on CPUs")
    device: Literal["auto", "gpu", "cpu"] = operational("auto", description="auto: GPUs where the cluster has some")
    micro_batch: int | None = operational(None, ge=1, description="images a rank takes at once; none: its whole share")
    zero: Stage = operational(1, description="what ranks share out: moments (1), gradients too (2), weights too (3)")
    offload: bool = operational(False, description="keep masters and moments in host memory, and update them there")
    checkpointing: Literal["none", "blocks"] | int = operational(
        "none", description="blocks whose inside is computed anew backwards, for memory: none, all, or each N-th (N)"
    )
    compile: bool | Literal["blocks"] = operational(
        False, description="let torch.compile build the network, or each kind of block alone: slow first, then faster"
    )
    log_every: int = operational(20, ge=1)
    save_every: int = operational(500, ge=1, description="steps between committed states; a multiple of log_every")
    keep: int = operational(2, ge=1, description="newest states that are kept; the second is there if one is damaged")
    keep_every: int = operational(0, ge=0, description="steps; states at multiples of it are kept for good; 0: none")
    export_every: int = operational(
        0, ge=0, description="steps; the EMA weights of multiples of it are published as checkpoints, too; 0: none"
    )
    retries: int = operational(
        2, ge=0, description="further attempts after a rank died, hung, or lost the store; each state renews them"
    )
    peak_tflops: float = operational(
        0.0, ge=0, description="of a rank's device, which perf/mfu is a share of; 0: what is known of its GPU"
    )
    hang_after: float = operational(600.0, gt=0, description="seconds without a step after which a run is ended")

    @model_validator(mode="before")
    @classmethod
    def _with_preset_defaults(cls, settings: Any) -> Any:
        return training_settings(settings) if isinstance(settings, dict) else settings

    @field_validator("preset")
    @classmethod
    def _is_a_preset(cls, name: str) -> str:
        try:
            preset(name)
        except SettingsError as error:
            raise Refused(error.message, remedy=error.remedy) from None
        return name

    @field_validator("model")
    @classmethod
    def _fits_the_preset(cls, changes: dict[str, Any], settings: ValidationInfo) -> dict[str, Any]:
        if "preset" in settings.data:
            check(ModelConfig, preset(settings.data["preset"]).model_dump() | changes)
        return changes

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        share = self.batch // self.workers
        if self.batch % self.workers or share % (self.micro_batch or share):
            raise ValueError("batch must be a multiple of workers x micro_batch")
        if self.reading.lanes % self.workers:
            raise ValueError(f"reading.lanes ({self.reading.lanes}) must be a multiple of workers ({self.workers})")
        if self.save_every % self.log_every:
            raise ValueError("save_every must be a multiple of log_every")
        if any(every % self.save_every for every in (self.keep_every, self.export_every, self.ema.keep_every)):
            raise ValueError("keep_every, export_every and ema.keep_every must be multiples of save_every")
        if self.validation.every % self.log_every:
            raise ValueError("validation.every must be a multiple of log_every")
        network = self.network()
        if network.task == "class" and (self.train_text or self.pack_text):
            which = "train_text" if self.train_text else "pack_text"
            raise ValueError(f"{which}: a network that draws from labels has no text encoder")
        if network.image_size is None:
            raise ValueError("model.image_size must be the size that is trained at")
        if isinstance(self.checkpointing, int) and self.checkpointing < 1:
            raise ValueError("checkpointing: a number is which blocks are computed anew, each N-th: 1 or more")
        if self.compile is True and self.zero == 3:
            raise ValueError("compile: true makes one graph, and zero 3 brings weights together by block: set blocks")
        if self.optim.matrices == "muon" and (self.zero == 3 or self.offload):
            raise ValueError("optim.matrices: muon needs whole matrices: use zero 1 or 2, without offload")
        if self.objective.repa and (self.micro_batch or share) < 2:
            raise ValueError("REPA's control needs at least two images in a micro-batch")
        _check_objective(self.objective, network)
        return self

    def network(self) -> ModelConfig:
        return ModelConfig(**(preset(self.preset).model_dump() | self.model))

    @property
    def recomputed(self) -> int:
        """N, where every N-th block of a stack is computed anew in the backward pass; 0: none is."""
        return self.checkpointing if isinstance(self.checkpointing, int) else int(self.checkpointing == "blocks")


def _check_objective(objective: ObjectiveSettings, network: ModelConfig) -> None:
    """Raises where the network is not one that the objective can be had for."""
    blocks, (first, last) = network.blocks, objective.routing.blocks
    if objective.repa and objective.repa_block > blocks:
        raise ValueError(f"objective.repa_block is {objective.repa_block}, but there are {blocks} blocks")
    if objective.routing.share and last >= blocks:
        raise ValueError(
            f"objective.routing.blocks are {first} to {last}, but only the first {blocks - 1} of {blocks} blocks can "
            "be skipped: what comes back must meet the other tokens once more"
        )
    if objective.perceptual.any and network.prediction != "image":
        raise ValueError("objective.perceptual compares predicted images: it needs model.prediction: image")
    if objective.perceptual.lpips and network.image_size is not None and network.image_size < LEAST_SIDE:
        raise ValueError(f"objective.perceptual.lpips needs images of at least {LEAST_SIDE} pixels a side")

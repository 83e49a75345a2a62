"""The settings of the training objective. Their defaults leave out whatever the published recipe does not have."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from infra.config import Fraction, Settings


class PerceptualSettings(Settings):
    """Losses on the predicted image, beside that of the velocity, as frozen networks see it."""

    lpips: float = Field(0.0, ge=0, description="weight of LPIPS, which compares textures; 0: none")
    dino: float = Field(0.0, ge=0, description="weight of the distance of the vision encoder's patch features; 0: none")
    times: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="times between which both apply, both included; 0 is noise, 1 the image"
    )

    @field_validator("times")
    @classmethod
    def _in_order(cls, times: tuple[float, float]) -> tuple[float, float]:
        if times[0] > times[1]:
            raise ValueError("the earlier of the two times must come first")
        return times

    @property
    def any(self) -> bool:
        return self.lpips > 0 or self.dino > 0


class RoutingSettings(Settings):
    """Token routing: while training, a part of an image's tokens skips some blocks. Pictures are drawn without."""

    share: Annotated[float, Field(ge=0, lt=1, description="of an image's tokens, drawn at random; 0: none")] = 0.0
    blocks: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        (2, 12), description="the first and the last block that they skip, counted from one"
    )

    @field_validator("blocks")
    @classmethod
    def _in_order(cls, blocks: tuple[int, int]) -> tuple[int, int]:
        if blocks[0] > blocks[1]:
            raise ValueError("the first of the two blocks must not come after the last")
        return blocks

    def kept(self, patches: int) -> int:
        """How many of so many tokens go through all blocks: at least one."""
        return max(1, patches - round(self.share * patches))


class ObjectiveSettings(Settings):
    time_shift: float = Field(2.0, gt=0, description="above 1: more of the training on noisy images")
    time_mean: float = Field(
        0.0, allow_inf_nan=False, description="of the normal whose sigmoid is the time; below 0: more on noisy images"
    )
    time_deviation: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of that normal; below 1: fewer times near noise and near images"
    )
    drop: Fraction = Field(0.1, description="share of captions made empty, or of labels made none, for guidance")
    repa: float = Field(0.5, ge=0, description="weight of the alignment with the vision encoder; 0: none")
    repa_block: int = Field(6, ge=1, description="the block whose tokens are aligned, counted from one")
    repa_until: int | None = Field(
        None, ge=1, description="steps with alignment; later ones are faster without it; none: all"
    )
    perceptual: PerceptualSettings = PerceptualSettings()
    routing: RoutingSettings = RoutingSettings()

    @property
    def sees(self) -> bool:
        """Whether the vision encoder is needed."""
        return self.repa > 0 or self.perceptual.dino > 0

    def aligns(self, step: int) -> bool:
        """Whether the step after so many others is one with alignment."""
        return self.repa > 0 and (self.repa_until is None or step < self.repa_until)

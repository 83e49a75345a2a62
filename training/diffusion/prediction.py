"""What a network predicts, as the velocity that losses and samplers ask for.

Shapes: B images; x is [B, C, H, W].
"""

from __future__ import annotations

from typing import overload

from torch import Tensor

from training.diffusion.path import spread
from training.model.condition import Condition, Embedded, TextTokens
from training.model.pixnerd import PixNerd

# Closest that 1 - t comes to nought where an image is turned into a velocity.
LEAST_NOISE = 0.05


def velocity_of_image(image: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The velocity that leads from x_t to a predicted image, in fp32, bounded near t = 1."""
    return (image.float() - x_t.float()) / (1 - spread(t_B.float(), x_t)).clamp(min=LEAST_NOISE)


class VelocityOfImage:
    """A network that predicts the image, called as one that predicts the velocity."""

    def __init__(self, net: PixNerd) -> None:
        self.net = net

    @overload
    def __call__(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition | TextTokens, tap: None = None) -> Tensor: ...
    @overload
    def __call__(
        self, x_BCHW: Tensor, t_B: Tensor, condition: Condition | TextTokens, tap: int
    ) -> tuple[Tensor, Tensor]: ...
    def __call__(
        self, x_BCHW: Tensor, t_B: Tensor, condition: Condition | TextTokens, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if tap is None:
            return velocity_of_image(self.net(x_BCHW, t_B, condition), x_BCHW, t_B)
        image_BCHW, tokens_BNH = self.net(x_BCHW, t_B, condition, tap)
        return velocity_of_image(image_BCHW, x_BCHW, t_B), tokens_BNH

    def embed(self, condition: Condition) -> Embedded:
        return self.net.embed(condition)


def as_velocity(net: PixNerd) -> PixNerd | VelocityOfImage:
    return VelocityOfImage(net) if net.config.prediction == "image" else net

"""Networks that predict the image, made to give the velocity that losses and samplers work with.

Image prediction under a velocity loss: Li and He 2025 (JiT), arXiv 2511.13720.

Shapes: B images; x is [B, C, H, W].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.diffusion.path import spread
from training.model.condition import Condition, Embedded, TextTokens
from training.model.pixnerd import PixNerd
from training.model.routing import Route

LEAST_NOISE = 0.05  # lower bound of the divisor 1 - t


def velocity_of_image(image: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """v = (image - x_t) / max(1 - t, 0.05), in fp32; the bound keeps it finite near t = 1."""
    return (image.float() - x_t.float()) / _divisor(t_B, x_t)


def image_of_velocity(v: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The image that `velocity_of_image` made v of, up to rounding."""
    return x_t.float() + v.float() * _divisor(t_B, x_t)


def _divisor(t_B: Tensor, x_t: Tensor) -> Tensor:
    return (1 - spread(t_B.float(), x_t)).clamp(min=LEAST_NOISE)


class VelocityOfImage:
    """Wraps a network that predicts the image; is called like one that predicts the velocity."""

    def __init__(self, net: PixNerd) -> None:
        self.net = net

    def __call__(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        condition: Condition | TextTokens,
        tap: int | None = None,
        route: Route | None = None,
    ) -> Any:
        if tap is None:
            return velocity_of_image(self.net(x_BCHW, t_B, condition, route=route), x_BCHW, t_B)
        image_BCHW, tokens_BNH = self.net(x_BCHW, t_B, condition, tap, route)
        return velocity_of_image(image_BCHW, x_BCHW, t_B), tokens_BNH

    def embed(self, condition: Condition) -> Embedded:
        return self.net.embed(condition)


def as_velocity(net: PixNerd) -> PixNerd | VelocityOfImage:
    return VelocityOfImage(net) if net.config.prediction == "image" else net

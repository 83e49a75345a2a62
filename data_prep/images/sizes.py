"""The sizes of training images: squares of one side, or a set of buckets with about equally many pixels.

A bucket keeps more of a tall or wide picture than a square does. The set is computed from its settings, so that it is
the same wherever it is needed, and a plan's digest determines it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from infra.config import Settings, spelt

Format = Literal["jpeg", "webp", "png"]
Subsampling = Literal["444", "422", "420"]
Resize = Literal["lanczos", "adm"]
SUFFIX: dict[Format, str] = {"jpeg": "jpg", "webp": "webp", "png": "png"}

PATCH = 16  # the side of the network's patches; images are made of whole ones
LARGEST = 8192  # the longest side


class Bucket(NamedTuple):
    width: int
    height: int


class Buckets(Settings):
    name: Annotated[
        str,
        spelt(r"[a-z][a-z0-9_.-]{0,59}", "at most 60 small letters, digits, `_`, `.` and `-`, a letter first"),
    ] = Field(description="what its shards and records are called")
    side: int = Field(
        ge=PATCH, le=LARGEST, description="the budget: no bucket has more pixels than a square of this side"
    )
    step: int = Field(64, ge=PATCH, multiple_of=PATCH, description="every side is a multiple of it")
    max_aspect: float = Field(2.0, ge=1, le=16, allow_inf_nan=False, description="longer side to shorter side, at most")

    @model_validator(mode="after")
    def _holds_a_bucket(self) -> Buckets:
        if self.side < self.step:
            raise ValueError(f"no bucket: one step of {self.step} is more than the side of {self.side}")
        return self

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every shape within the budget that is not contained in a larger one, from the tallest to the widest."""
        tallest = [self._tallest(width) for width in range(self.step, self.side**2 // self.step + 1, self.step)]
        shapes = [shape for shape in tallest if shape is not None]
        # A wider one that is no less tall contains a narrower one; equal widths do not occur.
        return tuple(a for a in shapes if not any(b.width > a.width and b.height >= a.height for b in shapes))

    def _tallest(self, width: int) -> Bucket | None:
        height = int(min(self.side**2 // width, width * self.max_aspect)) // self.step * self.step
        return Bucket(width, height) if height and width <= height * self.max_aspect else None

    def choose(self, width: int, height: int) -> Bucket | None:
        """The bucket that cuts least off a picture of this size; None where it is too small for all of them."""
        fitting = [bucket for bucket in self.buckets if bucket.width <= width and bucket.height <= height]
        return max(fitting, key=lambda b: (_kept(width, height, b), b.width * b.height, b.width), default=None)


Size = Annotated[int, Field(ge=8, le=LARGEST, description="the side of square images")] | Buckets


def size_name(size: Size) -> str:
    return size.name if isinstance(size, Buckets) else str(size)


def _kept(width: int, height: int, bucket: Bucket) -> float:
    """The share of the picture that remains when the largest part with the bucket's aspect is cropped."""
    one, other = width * bucket.height, height * bucket.width
    return min(one, other) / max(one, other)

"""What a look at a corpus tells: the settings of a source, why they are what they are, and some of its items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from data_prep.images.decode import decode
from data_prep.rejections import Rejection
from infra.errors import DataError

ROWS = 400  # of which columns are judged
PICTURES = 16  # that are decoded: enough to know their sides
ENOUGH = 4_000  # pictures for a first model: of a larger corpus of many files, the first ones that hold so many

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    source: dict[str, Any]  # as a recipe has it
    captions: list[str]  # of some items
    rows: int  # that the named files hold, as far as that is known
    counted: bool  # whether somebody counted them
    pictures: list[bytes | Rejection] = field(default_factory=list)  # of some items
    urls: list[str] = field(default_factory=list)  # of some items, where they are on the web
    remarks: dict[str, str] = field(default_factory=dict)  # a setting -> what to know about it
    warnings: list[str] = field(default_factory=list)

    def check_pictures(self, given: str) -> list[tuple[int, int]]:
        """The sides of those pictures that can be read."""
        found = [image if isinstance(image, Rejection) else decode(image) for image in self.pictures]
        sides = [image.pixels.shape[1::-1] for image in found if not isinstance(image, Rejection)]
        if found and not sides:
            why = next(image for image in found if isinstance(image, Rejection))
            said = f"{why.cause}, {why.detail}" if why.detail else str(why.cause)
            raise DataError(
                f"none of the first {len(found)} pictures of {given} can be read ({said})",
                remedy="check whether they open in a viewer; JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are read",
            )
        return [(int(width), int(height)) for width, height in sides]


def spread(values: Sequence[T], most: int) -> list[T]:
    """So many of them, evenly over all."""
    return [values[len(values) * number // most] for number in range(most)] if len(values) > most else list(values)


def first(values: Iterable[T], most: int) -> list[T]:
    return list(islice(values, most))

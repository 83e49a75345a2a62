"""What the survey of a corpus results in: candidate sources, each with its settings, the reasons, and some items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from data_prep.images.decode import decode
from data_prep.rejections import Rejection
from infra.errors import DataError

ROWS = 400  # of a table, by which its columns are judged
PICTURES = 16  # that are decoded, enough to know the usual size
ENOUGH = 4_000  # pictures for a first model: of a corpus of many files, a recipe takes only the first that hold so many

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A source that a corpus can be prepared as, and a sample of its items."""

    source: dict[str, Any]  # its settings, as a recipe has them
    captions: list[str]  # of some items
    rows: int  # in the files that `source` names: counted, or an estimate
    counted: bool
    pictures: list[bytes | Rejection] = field(default_factory=list)  # of some items
    urls: list[str] = field(default_factory=list)  # of some items, if they are on the web
    remarks: dict[str, str] = field(default_factory=dict)  # setting -> a comment on it for the recipe
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.source["kind"])

    def picture_sides(self, path: str) -> list[tuple[int, int]]:
        """Width and height of the pictures that can be read; an error if none can."""
        decoded = [image if isinstance(image, Rejection) else decode(image) for image in self.pictures]
        sides = [image.pixels.shape[1::-1] for image in decoded if not isinstance(image, Rejection)]
        if decoded and not sides:
            why = next(image for image in decoded if isinstance(image, Rejection))
            reason = f"{why.cause}, {why.detail}" if why.detail else str(why.cause)
            raise DataError(
                f"none of the first {len(decoded)} pictures of {path} can be read ({reason})",
                remedy="check whether they open in a viewer; JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are read",
            )
        return [(int(width), int(height)) for width, height in sides]


def files_needed(files: int, rows: int) -> int:
    """How many of the files are enough for a first model, if each has so many rows."""
    return min(files, max(1, -(-ENOUGH // max(1, rows))))


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly spread over all of them."""
    return [values[len(values) * number // most] for number in range(most)] if len(values) > most else list(values)


def first(values: Iterable[T], most: int) -> list[T]:
    return list(islice(values, most))

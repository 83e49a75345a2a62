"""What a part hands out while it runs: each figure is a line of a file at once, so that a killed part keeps them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.parts import Part
from tests.gpu.results import Row


@dataclass(frozen=True)
class Options:
    device: str = "cuda"
    tiny: bool = False  # the same code in seconds: its figures mean nothing
    batch: int | None = None  # of a training step, where the default does not fit

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"


class NotHere(Exception):
    """This machine lacks something, so the part cannot start."""


class Report:
    def __init__(self, part: Part, path: Path, where: str = "") -> None:
        self.part, self.path, self.where = part, path, where

    def figure(self, name: str, measured: str, floor: str | None = None, *, failed: bool = False) -> None:
        """A figure; where it has passed its bound, the call ends with an error."""
        row = Row(self.part.name, name, measured, self.part.figures[name] if floor is None else floor, self.where)
        print(f"{self.part.name}: {name}: {measured} ({row.floor})", flush=True)
        self.line({"row": row._asdict(), "failed": failed})

    def line(self, fields: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")


def today() -> str:
    return time.strftime("%Y-%m-%d")

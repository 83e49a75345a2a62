"""RESULTS.md: a table with a dated row for each figure. A call replaces rows of the parts that it ran, no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from infra.files import appearing
from tests.gpu.parts import MINUTES, PARTS, PEAK_TFLOPS, TB_PER_SECOND

RESULTS = Path(__file__).parent / "RESULTS.md"
NOT_RUN = "not run"
_HEAD = "| part | figure | measured | floor or bound | when and where |\n|---|---|---|---|---|\n"
_ABOUT = f"""# What a GPU gave

Written by `make gpu`; every part takes at most {MINUTES} minutes, and a row that has not been run says so. A floor is
what the matrix products alone would take at {PEAK_TFLOPS} TFLOP/s (bf16, measured on one H200), or what the traffic of
a kernel's inputs and outputs would take at {TB_PER_SECOND:g} TB/s; a bound is what a figure must not pass. Encoders
have random weights and the sizes of Qwen3-1.7B and DINOv2-B; only the text encoder's table of token embeddings is
smaller, which changes no product. MFU counts the matrix products of the network, forward and backward, and of both
encoders, over 128 text tokens an image.

"""


class Row(NamedTuple):
    part: str
    figure: str
    measured: str
    floor: str
    where: str = ""

    @property
    def was_run(self) -> bool:
        return not self.measured.startswith(NOT_RUN)


def planned() -> list[Row]:
    return [Row(part.name, name, NOT_RUN, floor) for part in PARTS.values() for name, floor in part.figures.items()]


def read(path: Path) -> list[Row]:
    """The rows of a table; none if there is no file."""
    if not path.is_file():
        return []
    rows = (_cells(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    return [Row(*cells) for cells in rows if len(cells) == len(Row._fields) and cells[0] in PARTS]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def merged(before: Iterable[Row], found: Iterable[Row], not_started: Mapping[str, str] | None = None) -> list[Row]:
    """Every planned row: as it was found now, else as it was measured before, else not run.

    `not_started` says why parts could not start; that does not take away what an earlier call has measured.
    """
    now = {(row.part, row.figure): row for row in found}
    then = {(row.part, row.figure): row for row in before}
    rows = []
    for row in planned():
        last = now.get((row.part, row.figure)) or then.get((row.part, row.figure), row)
        why = (not_started or {}).get(row.part)
        if not last.was_run:
            last = row._replace(measured=f"{NOT_RUN}: {why}" if why else last.measured)
        rows.append(last)
    return rows


def text(rows: Iterable[Row]) -> str:
    return _ABOUT + _HEAD + "".join("| " + " | ".join(map(_cell, row)) + " |\n" for row in rows)


def _cell(value: str) -> str:
    """On one line and without the sign that ends a cell: what is written is read back by the next call."""
    return " ".join(value.replace("|", "/").split())


def write(path: Path, rows: Iterable[Row]) -> None:
    with appearing(path) as unfinished:
        unfinished.write_text(text(rows), encoding="utf-8")

"""A sweep over sampling settings: guidance x steps x solver x EMA decay on prompts that are not the test's.

    evaluations/<stage>/swept/00012.json    Chunk: some prompts at one point of the grid
    evaluations/<stage>/sweep.json          Sweep: all points with their scores, and the best one by the rule

The rule is a setting, so it stands in the sweep's digest before the first picture is drawn. The grid is walked chunk by
chunk of prompts, and point by point within: an actor keeps the network, and encodes each prompt once for all points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from infra import layout
from infra.config import digest
from infra.records import CheckpointRecord, DataObject, Interval, Plain, Record, put_data, read_record, recorded
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation import official
from pipelines.evaluation.chunks import Made, Maker, Shelf, Show, make
from pipelines.evaluation.generate import Asked, Drawing, DrawingSettings, chunked
from pipelines.evaluation.judging import Judging, table_of
from pipelines.evaluation.run import GenevalSettings, outside, to_judge, verdicts_on
from pipelines.evaluation.sets import OTHER_SHAPES, SeededPrompts, prompt_set, read_prompts
from pipelines.evaluation.statistics import OVERALL, Scores, intervals, paired


class SweepSettings(GenevalSettings):
    prompts: str | SeededPrompts = Field(
        OTHER_SHAPES, description="as in an evaluation, but not those of the test: `{seeded: 20, seed: 7}`, say"
    )
    guidance: list[float] = Field([1.0, 2.0, 4.0], min_length=1)
    steps: list[int] = Field([25], min_length=1)
    solver: list[str] = Field(["adams2"], min_length=1)
    decay: list[float] = Field([], description="of the EMA, made out of averages that training kept; none: as it is")
    rule: Literal["best", "cheapest"] = Field(
        "best",
        description="best: the highest overall score; cheapest: of the points that no 95 % interval tells from that "
        "one, the one with the fewest evaluations of the network",
    )

    @model_validator(mode="after")
    def _not_on_the_test(self) -> SweepSettings:
        seed = self.prompts.seed if isinstance(self.prompts, SeededPrompts) else None
        if seed == official.SEED or self.prompts in ("shapes", "official", "rephrased"):
            told = self.prompts if seed is None else f"seed {seed}"
            raise ValueError(f"`{told}` gives the test's prompts: settings that are chosen on them fit them")
        for point in self.points():
            point.sampling(self.sampling)  # a value that sampling refuses is told before anything is drawn
        return self

    def points(self) -> list[Point]:
        decays: list[float | None] = [*self.decay] or [None]
        grid = product(decays, self.solver, self.steps, self.guidance)
        return [Point(guidance=g, steps=n, solver=solver, decay=decay) for decay, solver, n, g in grid]


class Point(Plain):
    guidance: float
    steps: int
    solver: str
    decay: float | None = None

    def sampling(self, base: DrawingSettings) -> DrawingSettings:
        changes = {"guidance": self.guidance, "steps": self.steps, "solver": self.solver}
        return DrawingSettings.model_validate(base.model_dump() | changes)

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for one picture: guidance doubles it, and so does Heun's method."""
        return self.steps * (2 if self.solver == "heun" else 1) * (1 if self.guidance == 1 else 2)


class Scored(Plain):
    point: Point
    scores: dict[str, Interval]
    failed: int
    details: DataObject  # Parquet: one row per image, as a report has it


class Sweep(Record):
    checkpoint: str  # digest of the record that the sweep was asked for
    prompt_set: str
    rule: str
    points: list[Scored]
    best: int  # the number of the point that the rule chooses


class Cell(NamedTuple):
    """Some prompts at one point."""

    checkpoint: CheckpointRecord
    settings: DrawingSettings
    asked: Asked


class _Sweeping(Maker[Cell]):
    noun = "batches of pictures"

    def __init__(self, store: Store, images: int) -> None:
        self.store, self.images = store, images
        self.drawing: Drawing | None = None

    def load(self, device: str) -> None:
        self.device = device

    def pictures(self, item: Cell) -> list[str]:
        return item.asked.pictures(self.images)

    def make(self, item: Cell) -> Made:
        if self.drawing is None or self.drawing.checkpoint != item.checkpoint:
            self.drawing = Drawing(self.store, item.checkpoint, self.images, item.settings)
            self.drawing.load(self.device)
        self.drawing.settings = item.settings
        return self.drawing.make(item.asked)


def stage_of(checkpoint: str, settings: SweepSettings) -> str:
    return digest(["sweep", checkpoint, settings.chosen(), outside(settings)])


def sweep(
    store: Store,
    checkpoints: Mapping[float | None, CheckpointRecord],
    settings: SweepSettings,
    show: Show,
) -> Sweep:
    """Draw and judge every point of the grid. `checkpoints` has one for each decay, or the one as it is under None."""
    asked_for = digest([record.digest() for record in checkpoints.values()])
    stage, needs = stage_of(asked_for, settings), settings.needs
    key = layout.SWEEP.at(stage=stage)
    if store.exists(key):
        return read_record(store, key, Sweep)
    points, prompts = settings.points(), read_prompts(settings)
    asked = chunked([prompt.prompt for prompt in prompts], settings.images, settings.sampling)
    places = _places(points, asked)
    cells = {
        number: Cell(checkpoints[points[k].decay], points[k].sampling(settings.sampling), asked[first])
        for number, (k, first) in enumerate(places)
    }
    drawn = make(Shelf(store, layout.SWEEPING, stage), _Sweeping(store, settings.images), cells, needs, show)
    of_point = [[drawn[n] for n, (k, _) in enumerate(places) if k == number] for number in range(len(points))]
    judge = Judging(store, settings.judge, prompts, max(1, int(needs.cpus)))
    to_look_at = {
        number * len(asked) + index: item
        for number, chunks in enumerate(of_point)
        for index, item in enumerate(to_judge(chunks, settings).values())
    }
    judging = make(Shelf(store, layout.ANSWERED, stage), judge, to_look_at, needs, show)
    scored, scores = [], []
    for number, (point, chunks) in enumerate(zip(points, of_point, strict=True)):
        own = [chunk for place, chunk in zip(to_look_at, judging, strict=True) if place // len(asked) == number]
        verdicts, failed = verdicts_on(store, prompts, chunks, own)
        details = put_data(
            store, layout.VERDICTS.at(stage=stage), f"point-{number}.parquet", parquet_bytes(table_of(verdicts))
        )
        scores.append(protocol.by_task(verdicts))
        told = {f"geneval/{name}": score for name, score in intervals(scores[-1], seed=settings.seed).items()}
        scored.append(Scored(point=point, scores=told, failed=failed, details=details))
    best = chosen(points, scores, settings.rule, settings.seed)
    told_set = prompt_set(settings)
    made = Sweep(checkpoint=asked_for, prompt_set=told_set, rule=settings.rule, points=scored, best=best)
    return recorded(store, key, made)


def _places(points: Sequence[Point], asked: Mapping[int, Asked]) -> list[tuple[int, int]]:
    """Point and first prompt of each cell in the order of work: each decay is another network."""
    decays = dict.fromkeys(point.decay for point in points)
    return [
        (number, first)
        for decay in decays
        for first in asked
        for number, point in enumerate(points)
        if point.decay == decay
    ]


def chosen(points: Sequence[Point], scores: Sequence[Scores], rule: str, seed: int) -> int:
    """The number of the point that the rule chooses; of equals the cheaper one, then the first."""
    overall = [intervals(of_point, seed=seed, draws=10)[OVERALL].value for of_point in scores]
    order = sorted(range(len(points)), key=lambda number: (-overall[number], points[number].evaluations, number))
    if rule == "best":
        return order[0]
    best = scores[order[0]]
    alike = [number for number in order if _not_told_apart(best, scores[number], seed)]
    return min(alike, key=lambda number: (points[number].evaluations, -overall[number], number))


def _not_told_apart(best: Scores, other: Scores, seed: int) -> bool:
    interval = paired(best, other, seed=seed)[OVERALL].interval
    return interval.low is None or interval.low <= 0

"""All that the page shows, read once from a workflow's records and the data that they name."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from infra.errors import NotFound
from infra.records import (
    CheckpointRecord,
    DataObject,
    EvalReport,
    EvaluateOutput,
    PrepareSummary,
    SampleOutput,
    SnapshotOutput,
    SnapshotRecord,
    StageRecord,
    TrainOutput,
    get_data,
    read_record,
)
from infra.store import Store
from pipelines.evaluation.tars import read_pictures
from pipelines.page.shape_outcomes import Fate, fates
from pipelines.sample import held_out

Rows = list[dict[str, Any]]

SEEDS = 4  # evaluation pictures shown of a prompt
OUTCOMES = 4  # right and wrong pictures of a task
SHOWN = 24  # captions shown, of those that were drawn


@dataclass(frozen=True)
class Picture:
    """A row of an evaluation's table of verdicts, with the picture that it is about."""

    task: str
    prompt: int
    text: str
    image: int
    correct: bool
    reasons: str
    png: bytes | None


_COLUMNS = ("task", "prompt", "text", "image", "correct", "reasons")  # other protocols' tables have more


@dataclass(frozen=True)
class Shown:
    """What was drawn for captions of the data: prompts, each with its original picture and the drawn ones."""

    record: held_out.Drawn
    pictures: list[tuple[held_out.Prompt, bytes | None, list[bytes]]]


@dataclass
class Story:
    """The stages in the workflow's order, and what their outputs name in the store, by the stage's number."""

    store: Store
    stages: list[StageRecord]
    prepared: dict[int, PrepareSummary] = field(default_factory=dict)
    fates: dict[int, list[Fate]] = field(default_factory=dict)
    snapshots: dict[int, SnapshotRecord] = field(default_factory=dict)
    checkpoints: dict[int, CheckpointRecord] = field(default_factory=dict)
    curves: dict[int, Rows] = field(default_factory=dict)
    reports: dict[int, EvalReport] = field(default_factory=dict)
    pictures: dict[int, list[Picture]] = field(default_factory=dict)
    outcomes: dict[int, list[Picture]] = field(default_factory=dict)
    drawn: dict[int, Shown] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # what is missing in the store

    def inputs(self, number: int) -> dict[str, int]:
        """Setting -> the number of the earlier stage that it names, if that stage is among these."""
        earlier = {stage.digest_of_work: k for k, stage in enumerate(self.stages[:number])}
        return {name: earlier[work] for name, work in self.stages[number].inputs.items() if work in earlier}

    def checkpoint_number(self, digest: str | None) -> int | None:
        """The training stage whose checkpoint has this digest."""
        return next((k for k, record in self.checkpoints.items() if record.digest() == digest), None)

    def before(self, number: int) -> list[int]:
        """The training stages whose weights this one inherited, the last of them first."""
        start = self.checkpoint_number(self.checkpoints[number].start_from)
        return [] if start is None else [start, *self.before(start)]

    def judged(self) -> int | None:
        """The evaluation whose score the page names first: the one that the last gate judged, else the last one."""
        of_gates = [self.inputs(k).get("scores.0") for k, record in enumerate(self.stages) if record.kind == "gate"]
        evaluations = [number for number in of_gates if number in self.reports]
        return evaluations[-1] if evaluations else max(self.reports, default=None)

    def snapshots_of(self, number: int) -> dict[int, SnapshotRecord]:
        """The snapshots that were made from a prepare stage's shards."""
        prefixes = {size.shards for size in self.prepared[number].sizes.values()}
        return {k: snapshot for k, snapshot in self.snapshots.items() if snapshot.shards in prefixes}


def read(store: Store, records: list[StageRecord]) -> Story:
    story = Story(store, records)
    for read_more, numbers in ((_read_output, range(len(records))), (_read_fates, story.prepared)):
        for number in numbers:
            try:
                read_more(story, number)
            except NotFound as error:
                story.lost.append(f"{records[number].stage}: {error.message}")
    return story


def _read_output(story: Story, number: int) -> None:
    """Read the record that a stage's output names, then its data; the record stays if the data is gone."""
    output, store = story.stages[number].output, story.store
    if isinstance(output, PrepareSummary):
        story.prepared[number] = output
    elif isinstance(output, SnapshotOutput):
        story.snapshots[number] = read_record(store, output.record, SnapshotRecord)
    elif isinstance(output, TrainOutput):
        trained = story.checkpoints[number] = read_record(store, output.record, CheckpointRecord)
        story.curves[number] = _table(store, trained.curve) if trained.curve else []
    elif isinstance(output, SampleOutput):
        drawn = read_record(store, output.record, held_out.Drawn)
        story.drawn[number] = Shown(drawn, held_out.pictures(store, drawn, most=SHOWN))
    elif isinstance(output, EvaluateOutput):
        report = story.reports[number] = read_record(store, output.record, EvalReport)
        _read_pictures(story, number, report)


def _read_fates(story: Story, number: int) -> None:
    """Read what became of each kind of file, if the corpus is the shape world."""
    corpora = [story.stages[k] for k in story.inputs(number).values() if story.stages[k].kind == "corpus"]
    sizes = list(story.prepared[number].sizes.values())
    if len(corpora) == 1 and sizes:
        snapshots = list(story.snapshots_of(number).values())
        story.fates[number] = fates(story.store, sizes[-1].shards, int(corpora[0].settings["seed"]), snapshots)


def _table(store: Store, data: DataObject) -> Rows:
    rows: Rows = pq.read_table(io.BytesIO(get_data(store, data))).to_pylist()
    return rows


def _read_pictures(story: Story, number: int, report: EvalReport) -> None:
    rows = _table(story.store, report.details)
    chosen, outcomes = _chosen(rows), _outcomes(rows)
    wanted = {(row["prompt"], row["image"]) for row in [*chosen, *outcomes]}
    pngs: dict[tuple[int, int], bytes] = {}
    for tar in report.pictures:  # one at a time: all pictures of a large evaluation would not fit in memory
        pngs |= {key: png for key, png in read_pictures(story.store, [tar]).items() if key in wanted}
    story.pictures[number], story.outcomes[number] = (
        [Picture(**{c: row[c] for c in _COLUMNS}, png=pngs.get((row["prompt"], row["image"]))) for row in some]
        for some in (chosen, outcomes)
    )


def _chosen(rows: Rows) -> Rows:
    """The first and the middle prompt of each task, so that nobody picks them by their pictures."""
    rows = [row for row in rows if row["image"] < SEEDS]
    numbers: dict[str, set[int]] = {}
    for row in rows:
        numbers.setdefault(row["task"], set()).add(row["prompt"])
    chosen = {k for of_task in map(sorted, numbers.values()) for k in (of_task[0], of_task[len(of_task) // 2])}
    return [row for row in rows if row["prompt"] in chosen]


def _outcomes(rows: Rows) -> Rows:
    """The first right and the first wrong pictures of each task, each of another prompt where there are enough."""
    found: dict[tuple[str, bool], Rows] = {}
    for row in sorted(rows, key=lambda row: (row["image"], row["prompt"])):
        found.setdefault((row["task"], row["correct"]), []).append(row)
    return [row for some in found.values() for row in some[:OUTCOMES]]

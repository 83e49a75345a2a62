"""What a run looks like: bars on a terminal, plain lines with a time elsewhere, tables at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from orchestration.patience import SILENCE, Watch

if TYPE_CHECKING:
    from infra.records import EvalReport, PrepareSummary, StageRecord
    from orchestration.workflow import Node, Plan
    from pipelines.stages.base import Progress as StageProgress

_SIGNS = {"reused": "=", "running": ">", "finished": "+", "failed": "!", "skipped": "-"}
_PLAN_SIGNS = {"done": "=", "open": "?", "new": ">"}


class Screen:
    """Progress of stages as they run. Goes to standard error, so that results can be piped on."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._bars = Progress(
            TextColumn("    {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bars.add_task("", visible=False)
        self._began = self._last_line = self.stage_began = time.monotonic()
        self._pace = _Pace()
        self._unsaid = ""  # the newest progress, if it came too soon after a line
        self._watch = Watch(self._remind)
        self.own = 0.0  # the part of the stage that this run did, as far as it tells

    def __enter__(self) -> Screen:
        self._bars.start()
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)
        self._bars.stop()

    def doing(self, what: str) -> None:
        """What goes on until something else is told; it is said only if that takes long."""
        self._unsaid = ""
        self._watch.doing(what)
        if not self._bars.disable:
            self._bars.remove_task(self._task)  # one that has had a total cannot be without one again
            self._task = self._bars.add_task(what, total=None)

    def stage(self, node: Node, event: str, text: str) -> None:
        """What happened to a stage."""
        self._pace = _Pace()
        self.doing(f"at {node.name}" if event == "running" else "working")
        if event == "running":
            self.own, self.stage_began = 0.0, time.monotonic()
        self._line(f"{_SIGNS[event]} {node.name:<12} {event:<8} {text}".rstrip())

    def progress(self, stage: str, so_far: StageProgress) -> None:
        self.own = so_far.own
        self.count(f"{stage}: {so_far.text}", so_far.done, so_far.total)

    def count(self, text: str, done: float, total: int) -> None:
        """A part of a thing moves the bar on as well."""
        self._pace = self._pace.after(done, total)
        self._watch.doing(f"at {text}")
        if not self._bars.disable:
            self._bars.update(self._task, description=text, completed=done, total=total or None, visible=True)
            return
        self._unsaid = ", ".join(filter(None, [f"  {text}", self._pace.left()]))
        if time.monotonic() - self._last_line > SILENCE:
            self._line(self._unsaid)

    def _remind(self, still: str) -> None:
        if self._bars.disable:  # else there is a bar that moves
            self._line(self._unsaid or still)

    def own_per_second(self, count: int) -> float:
        """Of so many that the stage has worked on in all: what this run did of them, in its own time."""
        return self.own * count / max(time.monotonic() - self.stage_began, 1e-3)

    def _line(self, text: str) -> None:
        self._unsaid = ""
        self._watch.spoke()
        self._last_line = time.monotonic()
        seconds = int(self._last_line - self._began)
        self._console.print(f"{seconds // 60:3d}:{seconds % 60:02d} {text}", markup=False)


@dataclass(frozen=True)
class _Pace:
    """How far a stage has come since it was first heard of, which need not be its beginning."""

    first: float = 0.0
    total: int = 0
    since: float = 0.0
    done: float = 0.0
    seconds: float = 0.0

    def after(self, done: float, total: int) -> _Pace:
        now = time.monotonic()
        if total != self.total or done < self.done:
            return _Pace(done, total, now, done)  # the stage's next part
        return replace(self, done=done, seconds=now - self.since)

    def left(self) -> str:
        """Empty while nothing is known."""
        if self.done <= self.first or self.done >= self.total:
            return ""
        seconds = round(self.seconds * (self.total - self.done) / (self.done - self.first))
        hours = f"{seconds // 3600}:" if seconds >= 3600 else ""
        return f"{hours}{seconds // 60 % 60:{'02' if hours else ''}d}:{seconds % 60:02d} left"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        drawn.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(drawn)


def show_plan(plans: Sequence[Plan]) -> None:
    for plan in plans:
        print(f"{_PLAN_SIGNS[plan.state]} {plan.node.name:<12} {plan.state:<5} {plan.why}")


def prepared(made: PrepareSummary, per_second: float) -> str:
    """What came of a preparation, at each size; `per_second`: inputs, of those that this run worked on itself."""
    from data_prep.rejections import counted

    told = [f"{per_second:,.0f} images/s"] if per_second else []
    several = len(made.sizes) > 1
    for size, counts in made.sizes.items():
        accepted = f"{size}: " * several + f"{counts.accepted:,} accepted"
        told.append(f"{accepted}, {counted(counts.rejected)}")
    return "; ".join(told)


def show_result(records: Iterable[StageRecord], reports: dict[str, EvalReport]) -> None:
    """The scores of each stage, what was registered, and where the page is."""
    from infra.records import RegisterOutput, ReportOutput, SampleOutput

    if reports:
        show_scores(reports)
    for out in (record.output for record in records):
        if isinstance(out, RegisterOutput):
            print(f"registered  {out.model} version {out.version} as `{out.alias}`: {out.source}")
        if isinstance(out, SampleOutput):
            print(f"pictures    {out.sheet}")
        if isinstance(out, ReportOutput):
            print(f"page        {out.path}")


def show_scores(reports: dict[str, EvalReport]) -> None:
    from pipelines.evaluation.statistics import NO_INTERVAL, ends, without_interval

    names = list(next(iter(reports.values())).scores)
    scores = [[report.scores[name] for report in reports.values()] for name in names]
    cells = [[f"{score.value:.3f} {ends(score)}" for score in row] for row in scores]
    table(["", *reports], [[name, *row] for name, row in zip(names, cells, strict=True)])
    if any(without_interval(score) for row in scores for score in row):
        print(NO_INTERVAL)

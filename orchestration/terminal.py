"""What a run shows: progress bars on a terminal, lines with the elapsed time elsewhere, tables at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from orchestration.patience import SILENCE, Watch

if TYPE_CHECKING:
    from infra.records import EvalReport, Interval, PrepareSummary, StageRecord
    from orchestration.workflow import Node, Plan
    from pipelines.stages.base import Progress as StageProgress

_SIGNS = {"reused": "=", "running": ">", "finished": "+", "failed": "!", "skipped": "-", "waiting": "~"}
_PLAN_SIGNS = {"done": "=", "open": "?", "new": ">", "closed": "-"}


class Screen:
    """The progress of stages. It goes to standard error, so that standard output holds results only."""

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
        self._unsaid = ""  # the newest progress, if it came too soon after the last line to be printed
        self._watch = Watch(self._remind)
        self.own = 0.0  # the share of the stage's work that this run did; other runs or earlier ones did the rest

    def __enter__(self) -> Screen:
        self._bars.start()
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)
        self._bars.stop()

    def doing(self, what: str) -> None:
        """Set what is being done from now on. It is printed only if it takes long."""
        self._unsaid = ""
        self._watch.doing(what)
        if not self._bars.disable:
            self._bars.remove_task(self._task)  # rich cannot take a task's total away again
            self._task = self._bars.add_task(what, total=None)

    def stage(self, node: Node, event: str, text: str) -> None:
        self._pace = _Pace()
        verbs = {"running": "at", "waiting": "waiting for"}
        self.doing(f"{verbs[event]} {node.name}" if event in verbs else "working")
        if event == "running":
            self.own, self.stage_began = 0.0, time.monotonic()
        self._line(f"{_SIGNS[event]} {node.name:<12} {event:<8} {text}".rstrip())

    def progress(self, stage: str, so_far: StageProgress) -> None:
        self.own = so_far.own
        self.count(f"{stage}: {so_far.text}", so_far.done, so_far.total)

    def count(self, text: str, done: float, total: int) -> None:
        """Show that `done` of `total` things are done; `done` may be a fraction."""
        self._pace = self._pace.after(done, total)
        self._watch.doing(f"at {text}")
        if not self._bars.disable:
            self._bars.update(self._task, description=text, completed=done, total=total or None, visible=True)
            return
        self._unsaid = ", ".join(filter(None, [f"  {text}", self._pace.left()]))
        if time.monotonic() - self._last_line > SILENCE:
            self._line(self._unsaid)

    def _remind(self, text: str) -> None:
        if self._bars.disable:  # otherwise a bar moves
            self._line(self._unsaid or text)

    def own_per_second(self, count: int) -> float:
        """This run's speed: its share of the `count` things that the stage worked on, over the time that it took."""
        return self.own * count / max(time.monotonic() - self.stage_began, 1e-3)

    def _line(self, text: str) -> None:
        self._unsaid = ""
        self._watch.spoke()
        self._last_line = time.monotonic()
        seconds = int(self._last_line - self._began)
        self._console.print(f"{seconds // 60:3d}:{seconds % 60:02d} {text}", markup=False)


@dataclass(frozen=True)
class _Pace:
    """A stage's progress since its first report, for the time left: a resumed stage does not begin at 0."""

    first: float = 0.0
    total: int = 0
    since: float = 0.0
    done: float = 0.0
    seconds: float = 0.0

    def after(self, done: float, total: int) -> _Pace:
        now = time.monotonic()
        if total != self.total or done < self.done:
            return _Pace(done, total, now, done)  # the stage has begun its next part
        return replace(self, done=done, seconds=now - self.since)

    def left(self) -> str:
        """The time left, such as "1:02:03 left"; empty while it is not known."""
        if self.done <= self.first or self.done >= self.total:
            return ""
        seconds = round(self.seconds * (self.total - self.done) / (self.done - self.first))
        hours = f"{seconds // 3600}:" if seconds >= 3600 else ""
        return f"{hours}{seconds // 60 % 60:{'02' if hours else ''}d}:{seconds % 60:02d} left"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        grid.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(grid)


def show_plan(plans: Sequence[Plan]) -> None:
    for plan in plans:
        print(f"{_PLAN_SIGNS[plan.state]} {plan.node.name:<12} {plan.state:<6} {plan.why}")


def prepared(summary: PrepareSummary, per_second: float) -> str:
    """The speed, if it is known (not 0), and the counts of a preparation: `40 images/s; 36 accepted, ...`."""
    from data_prep.rejections import counted

    texts = [f"{per_second:,.0f} images/s"] if per_second else []
    for size, counts in summary.sizes.items():
        label = f"{size}: " if len(summary.sizes) > 1 else ""
        texts.append(f"{label}{counts.accepted:,} accepted, {counted(counts.rejected)}")
    return "; ".join(texts)


def show_result(records: Iterable[StageRecord], reports: Iterable[dict[str, EvalReport]]) -> None:
    """Print the scores of each stage, what was registered, and where contact sheet and report page are."""
    from infra.records import RegisterOutput, ReportOutput, SampleOutput

    for of_protocol in reports:
        show_scores(of_protocol)
    for out in (record.output for record in records):
        if isinstance(out, RegisterOutput):
            print(f"registered  {out.model} version {out.version} as `{out.alias}`: {out.source}")
        if isinstance(out, SampleOutput):
            print(f"pictures    {out.sheet}")
        if isinstance(out, ReportOutput):
            print(f"page        {out.path}")


def show_scores(reports: dict[str, EvalReport]) -> None:
    show_intervals({name: report.scores for name, report in reports.items()})


def show_intervals(columns: Mapping[str, Mapping[str, Interval]]) -> None:
    """What was evaluated -> its scores by name."""
    from pipelines.evaluation.statistics import NO_INTERVAL, ends, without_interval

    def cell(scores: Mapping[str, Interval], name: str) -> str:
        score = scores.get(name)
        return "" if score is None else f"{score.value:.3f} {ends(score)}"

    names = dict.fromkeys(name for scores in columns.values() for name in scores)
    table(["", *columns], [[name, *(cell(scores, name) for scores in columns.values())] for name in names])
    if any(without_interval(score) for scores in columns.values() for score in scores.values()):
        print(NO_INTERVAL)

"""What a training run can draw so far: pictures and a small GenEval of the checkpoints on its way, beside the training.

They are to be looked at and decide nothing. One checkpoint is drawn at a time, in a thread of the driver. If the next
ones are there before it is done, only the newest of them is drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, model_validator

from infra.actors import Needs
from infra.causes import first_line
from infra.records import CheckpointRecord, EvalReport, SnapshotRecord, read_record
from infra.store import Store
from pipelines.evaluation.run import GenevalSettings, geneval
from pipelines.sample import held_out
from pipelines.sample.held_out import DrawSettings


class PreviewSettings(DrawSettings):
    per_task: int = Field(0, ge=0, description="prompts a task of a GenEval on the shape world's prompts; 0: none")
    gpus: float = Field(0.0, ge=0, description="GPUs that drawing asks Ray for; 0: it draws on one of the CPUs")

    @model_validator(mode="after")
    def _has_enough_prompts(self) -> PreviewSettings:
        if self.per_task == 1:
            raise ValueError("per_task must be 0, or at least 2")
        return self


class Preview(NamedTuple):
    step: int
    sheet: Path
    report: EvalReport | None


class Previews:
    """`show` gets each preview, and `tell` says in one line why there is none."""

    def __init__(
        self,
        store: Store,
        stage: str,
        home: Path,
        data: SnapshotRecord,
        settings: PreviewSettings,
        show: Callable[[Preview], None],
        tell: Callable[[str], None],
    ) -> None:
        self.store, self.stage, self.home, self.data, self.settings = store, stage, home, data, settings
        self.show, self.tell = show, tell
        self._newest: tuple[int, str] | None = None  # step and key of the checkpoint that waits
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
        self._thread.start()

    def begin(self, step: int, key: str) -> None:
        """Draw the checkpoint with this key once the one before is done."""
        with self._changed:
            self._newest = step, key
            self._changed.notify()

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is being drawn and for the newest checkpoint that waits; not if training was stopped."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if kind is None:
            self._thread.join()

    def _run(self) -> None:
        while (checkpoint := self._next()) is not None:
            step, key = checkpoint
            try:
                self.show(self._draw(step, read_record(self.store, key, CheckpointRecord)))
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on without this preview
                self.tell(f"no preview of step {step}: {first_line(error)}")

    def _next(self) -> tuple[int, str] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._newest is not None)
            checkpoint, self._newest = self._newest, None
            return checkpoint

    def _draw(self, step: int, checkpoint: CheckpointRecord) -> Preview:
        settings, name = self.settings, f"{self.stage}-{step:08d}"
        needs = Needs(workers=1, cpus=0, gpus=settings.gpus)  # training has the CPUs
        drawn = held_out.draw(self.store, name, checkpoint, self.data, settings, _say_nothing, needs)
        sheet = self.home / f"step-{step:08d}.png"
        self.home.mkdir(parents=True, exist_ok=True)
        held_out.write_sheet(self.store, drawn, f"step {step:,}", sheet)
        report = None
        if settings.per_task:
            asked = {"per_task": settings.per_task, "images": settings.images, "sampling": settings.sampling}
            report = geneval(self.store, name, checkpoint, GenevalSettings(**asked), _say_nothing, needs)
        return Preview(step, sheet, report)


def _say_nothing(text: str, done: int, total: int) -> None:
    """Training has the line of progress."""

"""What a run leaves for good: the checkpoint that it ends with, those of steps on the way, and all of its averages.

<prefix>/average/<step>-<rank>-<number>-<sha256>.safetensors   a rank's ranges of one average
<prefix>/averages/<step>.json                                  the record of all averages of a step
<prefix>/checkpoints/<step>.json                               the record of a checkpoint on the way

All of a step is written before its state is committed. So a run that resumes from the state finds it done, and one that
was killed before makes the same bytes again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from infra import layout
from infra.errors import NotFound
from infra.records import AveragesPart, AveragesRecord, CheckpointRecord, DataObject, put_data, write_record
from infra.store import Store
from training import checkpoint
from training import model as models
from training.ema import PUBLISHED, EmaSettings
from training.encoders.text import TextEncoder
from training.model.presets import ModelConfig
from training.states import Part
from training.team import Team

Curve = list[dict[str, float]]
_TEXT, _HEAD = "text.", "head."  # how the names of a text encoder's and of REPA's weights begin among those trained


@dataclass(frozen=True)
class Frame:
    """A checkpoint's folder without the weights that were trained."""

    config: ModelConfig
    text: TextEncoder | None  # that goes into the folder
    extra: Mapping[str, Any]

    @classmethod
    def of(
        cls, config: ModelConfig, text: Path | str | None, *, trained: bool, sizes: Sequence[tuple[int, int]]
    ) -> Frame:
        """A published text encoder that was not trained is only named; a network that draws from labels has none."""
        extra: dict[str, Any] = {"buckets": sizes} if len(sizes) > 1 else {}
        if text is None:
            return cls(config, None, extra)
        if isinstance(text, str) and not trained:
            return cls(config, None, extra | {"text_encoder": text})
        return cls(config, TextEncoder(text, config.text_tokens), extra | {"text_encoder": "text"})

    def write(self, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """`weights` are by the names that they have in `training.step.Trained`."""

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}

        models.save(folder, models.outline(self.config), self.extra, under("net."))
        if self.text is not None:
            unknown = self.text.load_state_dict(under(_TEXT), strict=False).unexpected_keys  # the rest stayed frozen
            assert not unknown, f"weights of parameters that the text encoder does not have: {unknown}"
            self.text.save(folder / "text")
        if head := under(_HEAD):
            save_file(head, folder / models.HEAD)
        models.write_sums(folder)


@dataclass(frozen=True)
class Publisher:
    """One rank's part in what its run leaves."""

    store: Store
    prefix: str
    team: Team
    allowed: Callable[[], None]  # raises if the run is another driver's by now
    facts: Mapping[str, Any]  # of every record: `run`, `snapshot`, `start_from`
    frame: Callable[[], Frame]
    shapes: Mapping[str, tuple[int, ...]]  # of the parameters that are trained
    ema: EmaSettings
    every: int  # steps between checkpoints on the way; 0: none
    steps: int

    def before_state(self, step: int, position: int, curve: Curve) -> Callable[[Team, Part], None]:
        """What is to be done on all ranks, in another thread, before the state of this step is committed.

        The text encoder is read at once: loading it changes settings of the whole process for a moment.
        """
        key = self.exported(step)
        due = bool(key) and not self.team.on_rank_0(lambda: self.store.exists(key))
        frame = self.frame() if due and self.team.rank == 0 else None

        def work(team: Team, part: Part) -> None:
            self._keep_averages(team, part, step, position)
            if due:
                self._publish(team, part, frame, key, step, position, curve)

        return work

    def exported(self, step: int) -> str:
        """The key of the checkpoint of a step on the way, where one is due."""
        due = self.every > 0 and step % self.every == 0
        return layout.CHECKPOINT_AT.at(home=self.prefix, step=step) if due else ""

    def publish(self, part: Part, step: int, position: int, curve: Curve) -> CheckpointRecord:
        """The run's result, on all ranks; its record says that the run is done."""
        self._keep_averages(self.team, part, step, position)
        frame = self.frame() if self.team.rank == 0 else None
        key = layout.CHECKPOINT.at(home=self.prefix)
        return self._publish(self.team, part, frame, key, step, position, curve)

    def _publish(
        self, team: Team, part: Part, frame: Frame | None, key: str, step: int, position: int, curve: Curve
    ) -> CheckpointRecord:
        own = {name: part.tensors[f"{PUBLISHED}/{name}"] for name in part.ranges}
        weights = {name: flat.view(self.shapes[name]) for name, flat in team.gathered(own, part.ranges).items()}

        def publish() -> CheckpointRecord:
            assert frame is not None
            self.allowed()
            return checkpoint.publish(
                self.store,
                self.prefix,
                lambda folder: frame.write(weights, folder),
                key=key,
                step=step,
                position=position,
                parameters=sum(p.numel() for p in models.outline(frame.config).parameters()),
                truncated_captions=round(sum(row.get("data/truncated_captions", 0.0) for row in curve)),
                curve=checkpoint.store_curve(self.store, self.prefix, curve),
                **self.facts,
            )

        return team.on_rank_0(publish)

    def _keep_averages(self, team: Team, part: Part, step: int, position: int) -> None:
        if not self.ema.keeps(step, self.steps):
            return
        profiles = self.ema.profiles()

        def put(number: int, average: str) -> DataObject:
            own = {name: part.tensors[f"{average}/{name}"].cpu().contiguous() for name in part.ranges}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "average.safetensors"
                save_file(own, path)
                name = f"{step:08d}-{team.rank:05d}-{number}.safetensors"
                return put_data(self.store, layout.AVERAGES_PARTS.at(home=self.prefix), name, path)

        def put_all() -> AveragesPart:
            files = {average: put(number, average) for number, average in enumerate(profiles)}
            return AveragesPart(files=files, ranges=part.ranges)

        def commit(parts: list[AveragesPart]) -> None:
            self.allowed()
            record = AveragesRecord(step=step, position=position, profiles=profiles, parts=parts, **self.facts)
            write_record(self.store, layout.AVERAGES.at(home=self.prefix, step=step), record)

        parts = team.on_each_rank(put_all)
        team.on_rank_0(lambda: commit(parts))

    def take_back(self, step: int) -> None:
        """A run that goes back to this step, and on past other batches, has not come to the later steps."""

        def delete() -> None:
            self.allowed()
            for place in (layout.AVERAGES, layout.CHECKPOINT_AT):
                for key in list(place.keys(self.store, home=self.prefix)):
                    if place.parts(key)["step"] > step:
                        with suppress(NotFound):
                            self.store.delete(key)

        self.team.on_rank_0(delete)

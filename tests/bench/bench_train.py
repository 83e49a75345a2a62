"""Where a training step's time goes: data, draws, text, vision, model, optimiser, EMA and logging.

One rank runs the demo's stages through the loop itself, on pictures of the shape world; nothing is committed. `low`
trains its text encoder and has REPA, `sft` has its text encoder frozen and no REPA. On a GPU each part is waited for,
so there the sum is more than a step that runs ahead of its kernels takes. What the loader's threads do meanwhile is
told apart, as CPU time. A driver's Ray and MLflow are not in it.

    python -m tests.bench.bench_train [--steps 150] [--stages low,sft] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from infra.config import parse
from infra.records import DataObject, SnapshotRecord, put_data
from infra.store import FileStore
from infra.tracking import NOWHERE
from pipelines.recipes import load
from pipelines.stages.train import TinyText, TinyVision
from tests.gpu.inputs import start_rank
from tests.training import small_run
from training import loop, step
from training.diffusion import draws
from training.encoders import text, vision
from training.job import Job
from training.meter import Meter
from training.settings import TrainSettings
from training.team import Team

WARM_UP = 20  # steps
PARTS = ("data", "draws", "text", "vision", "model", "optimiser", "EMA", "logging", "rest")


class Clock:
    """Seconds of each part in each step; a part within another counts for itself alone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open, self._since = ["rest"], time.perf_counter()

    def begin(self) -> None:
        self._switch()
        self.steps.append(defaultdict[str, float](float))

    def call(self, part: str, function: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        self._switch()
        self._open.append(part)
        try:
            return function(*inputs, **named)
        finally:
            self._switch()
            self._open.pop()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs, **named: self.call(part, function, *inputs, **named)

    def _switch(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.steps:
            self.steps[-1][self._open[-1]] += now - self._since
        self._since = now


class Ahead:
    """CPU seconds of the loader's threads."""

    def __init__(self) -> None:
        self.seconds, self._lock = defaultdict[str, float](float), threading.Lock()

    def around(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*inputs: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*inputs, **named)
            finally:
                with self._lock:
                    self.seconds[what] += time.thread_time() - began

        return timed


def watch(training: loop.Training, clock: Clock, ahead: Ahead) -> None:
    """Puts the clock around every part of a step."""
    batches, engine, prepare = training.batches, training.engine, training.prepare
    iterate = batches.iterate

    def timed(position: int) -> Generator[Any]:
        with closing(iterate(position)) as stream:
            while True:
                clock.begin()
                yield clock.call("data", next, stream)

    set_(batches, iterate=timed, draw=ahead.around("draws", batches.draw), _fill=ahead.around("all", batches._fill))
    trained = training.networks.trained
    if trained.text is not None:
        set_(trained.text, forward=clock.around("text", trained.text.forward))
    for name, part in (("frozen_text", "text"), ("vision", "vision")):
        if (encoder := getattr(prepare, name)) is not None:
            set_(prepare, **{name: clock.around(part, encoder)})
    inner = engine._engine
    set_(
        inner,
        forward=clock.around("model", inner.forward),
        backward=clock.around("model", inner.backward),
        step=clock.around("optimiser", inner.step),
    )
    set_(training.ema, update=clock.around("EMA", training.ema.update))
    set_(training, _log=clock.around("logging", training._log))


def set_(thing: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        object.__setattr__(thing, name, value)


def timed_meter(clock: Clock) -> type[Meter]:
    class Timed(Meter):
        def add(self, *inputs: Any) -> None:
            clock.call("logging", super().add, *inputs)

        def read(self, *inputs: Any) -> dict[str, float]:
            row: dict[str, float] = clock.call("logging", super().read, *inputs)
            return row

    return Timed


def encoders(store: FileStore, folder: Path) -> dict[str, dict[str, DataObject]]:
    """As the demo's stage of that name makes them."""
    captions = [f"a {size} {colour} circle above a square" for size in ("small", "large") for colour in ("red", "blue")]
    text.build_tiny(folder / "text", captions * 9, **TinyText().model_dump())
    vision.build_tiny(folder / "vision", **TinyVision().model_dump())
    return {
        part: {path.name: put_data(store, f"encoders/{part}", path.name, path) for path in (folder / part).iterdir()}
        for part in ("text", "vision")
    }


def settings(stage: str, steps: int, device: str) -> TrainSettings:
    given = {k: v for k, v in load("demo").stages[stage].items() if k in TrainSettings.model_fields}
    model = given["model"] | {"text_dim": TinyText().hidden, "image_size": 16}
    own = {"workers": 1, "steps": steps, "save_every": 1000 * given["log_every"], "model": model}
    if device == "cuda":
        own["precision"] = "bf16"
    return parse(TrainSettings, given | own)


def measure(stage: str, steps: int, device: str, store: FileStore, data: SnapshotRecord, made: Any, root: Path) -> None:
    job = Job(
        store=store,
        prefix=f"training/{stage}",
        digest=stage,
        settings=settings(stage, WARM_UP + steps, device),
        snapshot=data,
        text=made["text"],
        vision=made["vision"],
        start_from=None,
        run=NOWHERE,
        cache=root / "cache",
    )
    scratch, clock, ahead = root / stage, Clock(), Ahead()
    scratch.mkdir()
    timed_normal = patch.object(step, "normal", clock.around("draws", draws.normal))
    with timed_normal, patch.object(loop, "Meter", timed_meter(clock)):
        training = loop.Training(replace(job, scratch=scratch), lambda message: None, Team(), scratch)
        watch(training, clock, ahead)
        training.run()
        training.close()
    show(stage, job.settings, clock.steps[WARM_UP:], ahead, training)


def show(stage: str, used: TrainSettings, steps: list[dict[str, float]], ahead: Ahead, training: loop.Training) -> None:
    whole = [sum(parts.values()) for parts in steps]
    parameters = sum(p.numel() for p in training.networks.trained.parameters())
    print(
        f"{stage}: {parameters / 1e6:.1f} M parameters, batch {used.batch}, {used.precision},"
        f" on {training.engine.device}: {statistics.median(whole) * 1e3:.1f} ms a step (median of {len(steps)})"
    )
    print(f"  {'':10} {'median':>9} {'mean':>9} {'share of the time':>18}")
    for part in PARTS:
        values = [parts[part] for parts in steps]
        print(
            f"  {part:10} {statistics.median(values) * 1e3:6.2f} ms {statistics.mean(values) * 1e3:6.2f} ms"
            f" {100 * sum(values) / sum(whole):16.1f} %"
        )
    taken = len(steps) + WARM_UP
    draws, other = ahead.seconds["draws"], ahead.seconds["all"] - ahead.seconds["draws"]
    print(
        f"  {training.batches.threads} threads ahead, CPU a step: pictures, captions and tokens"
        f" {other / taken * 1e3:.2f} ms, draws {draws / taken * 1e3:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--stages", default="low,sft")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_rank(options.device)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        store = FileStore(root / "store")
        data = small_run.write_data(root / "corpus", store, count=200)
        made = encoders(store, root / "encoders")
        for stage in options.stages.split(","):
            measure(stage, options.steps, options.device, store, data, made, root)


if __name__ == "__main__":
    main()

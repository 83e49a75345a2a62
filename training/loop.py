"""A training run from the snapshot to the published checkpoint; every rank runs `train`.

    build or inherit the network -> shard it -> resume from the newest committed state -> steps, each followed by an EMA
    update -> a state committed every `save_every` steps, and before it what is kept for good (`publish.py`) -> the EMA
    weights as a checkpoint, its record last

Only rank 0 asks the store for the run's states, and broadcasts what it reads; the ranks compare what they are about to
do. So two drivers on one run at the same time cannot make a model of mixed steps. Data order, noise, times and dropped
conditions depend on the position alone, so a resumed run continues the same samples on any number of ranks.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from infra.errors import SettingsError, Stopped, TrainingError
from infra.records import CheckpointRecord, DataObject
from training import checkpoint, states
from training.ema import Ema
from training.engine import Engine
from training.job import Job
from training.loader import cache
from training.loader.batches import Batch, Batches, Drawing
from training.loader.conditions import Captions, Labels
from training.loader.reader import Reader
from training.loader.selection import Selection
from training.meter import Meter
from training.model.compiled import set_execution
from training.networks import Networks, Origins, build, fetch
from training.optim import learning_rate
from training.perf import Perf, flop_per_image, peak
from training.publish import Frame, Publisher
from training.settings import TrainSettings
from training.step import Preparer, drawn
from training.team import Team
from training.validation import Validation, draw_evenly
from training.watchdog import Watchdog

_RECENT = 10  # log lines that a loss is compared with


Send = Callable[[dict[str, Any]], None]  # takes progress messages such as {"event": "saved", "step": 500}


def train(job: Job, send: Send) -> CheckpointRecord:
    """Runs on every rank, with `torch.distributed` initialised."""
    team = Team()
    if (done := team.on_rank_0(lambda: checkpoint.published(job.store, job.prefix))) is not None:
        return done
    folder = Path(tempfile.mkdtemp(prefix="pixnerd-train-", dir=job.scratch))
    try:
        training = Training(job, send, team, folder)
        try:
            training.run()
        finally:
            training.close()
        return training.publish()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Training:
    """A run on one rank: where it stands, and what moves it."""

    def __init__(self, job: Job, send: Send, team: Team, folder: Path) -> None:
        self.job, self.settings, self.send, self.team = job, job.settings, send, team
        self.origins = fetch(job, folder, team.on_rank_0)
        self.networks = build(self.settings, self.origins)
        set_execution(self.networks.trained.net, self.settings.compile, self.settings.recomputed)
        self.engine = _shard(self.networks, self.settings, team.size)
        self.ema = Ema(self.engine.masters, self.settings.ema)
        self.prepare = _preparer(self.networks, self.settings, self.engine.device)
        # Before batches are read ahead in threads, which use the same tokenizer.
        self.validation = _validation(job, self.networks, team, self.prepare)
        self.perf = _perf(self.networks, self.settings, self.engine.device)
        self.reader = _reader(job, job.snapshot.selection)
        drawing = drawn(self.settings.objective, self.settings.network(), self.settings.seed)
        self.batches = _batches(self.reader, self.networks, self.settings, team, self.engine.device, drawing)
        self.unreadable: set[int] = set()  # rows that were told of
        self.publisher = _publisher(job, self.origins, self.reader.selection.sizes, self.engine, team)
        self.told_truncated = False  # that captions are cut
        self.saver = states.Saver(
            job.store,
            job.prefix,
            run=job.digest,
            attempt=team.on_rank_0(lambda: uuid.uuid4().hex[:12]),
            keep=self.settings.keep,
            keep_every=self.settings.keep_every,
            allowed=job.check_claim,
            settle=self.reader.settle,
        )
        self.step, self.position = 0, 0
        self.curve: list[dict[str, float]] = []
        self.returns: list[states.Return] = []

    def run(self) -> None:
        """From the newest committed state to the last step; back to the last good state where the weights break."""
        self._resume()
        orders = self.batches.orders
        left_out = {"rows": orders.total, "left_out": orders.total - orders.epoch_length}
        self.send({"event": "start", "step": self.step, "steps": self.settings.steps, **left_out})
        while self.step < self.settings.steps:
            if broken := self._steps():
                self._return(broken)
        self.reader.settle()
        self.saver.wait()

    def _resume(self) -> bool:
        state = states.resume(self.job.store, self.job.prefix, self.team, self.engine, self.ema, self._tell)
        if state is not None:
            self.step, self.position, self.curve = state.step, state.position, list(state.curve)
            self.returns = list(state.returns)
        return state is not None

    def _tell(self, text: str) -> None:
        self.send({"event": "told", "text": text})

    def _tell_unreadable(self, batch: Batch) -> None:
        """Name each image that could not be decoded once; every rank tells of its own."""
        for row in batch.unreadable.keys() - self.unreadable:
            self.unreadable.add(row)
            text = f"{batch.unreadable[row]}: it counts with weight 0; run `pixnerd data verify`"
            self.send({"event": "unreadable", "text": text})

    def _steps(self) -> str:
        """Steps until the last one, or until the weights are broken, which it then says."""
        settings, meter, clock = self.settings, Meter(self.engine.device), time.perf_counter()
        warned = stopped = False  # by those who take the machine away or end the run: a state is committed at once
        with closing(self.batches.iterate(self.position)) as batches, closing(self._watchdog()) as watchdog:
            while self.step < settings.steps:
                self.saver.check()
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                self._tell_unreadable(batch)
                rate = learning_rate(settings.optim, self.step, settings.steps)
                prepare = partial(self.prepare, step=self.step)
                reports, norm = self.engine.step(map(prepare, batch.split(self.engine.micro_batch)), rate)
                meter.add(reports, norm, waited)
                self.ema.update(self.engine.masters, self.step)
                watchdog.beat()
                self.step += 1
                self.position += settings.batch
                due = self.step % settings.save_every == 0
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    seconds, clock = time.perf_counter() - clock, time.perf_counter()
                    row, meter = meter.read(self.team.size, seconds, rate), Meter(self.engine.device)
                    if broken := self._broken(row):
                        return broken
                    row |= self.perf.read(row["perf/images_per_second"], self.team.size)
                    if self.validation is not None and self.step % settings.validation.every == 0:
                        row |= self.validation.losses(self.engine)
                        watchdog.beat()
                        clock = time.perf_counter()
                    self._log(row)
                    if not warned and self.job.ends_soon is not None and self.job.ends_soon():
                        warned = due = True
                    stopped = self.job.stopped is not None and self.team.on_rank_0(self.job.stopped)
                if (due or stopped) and self.step < settings.steps:
                    self._save()
                    if stopped:
                        self._stop()
        return ""

    def _stop(self) -> NoReturn:
        self.saver.wait()
        self.send({"event": "stopped", "step": self.step})
        remedy = "run again: it goes on from there"
        raise Stopped(f"stopped at step {self.step}, whose state is committed", remedy=remedy)

    def _watchdog(self) -> Watchdog:
        rank = self.team.rank
        return Watchdog(
            self.settings.hang_after, rank, lambda text: self.send({"event": "hung", "rank": rank, "text": text})
        )

    def _broken(self, row: dict[str, float]) -> str:
        """What is wrong with the steps since the last log line; nothing if training may go on from them.

        DeepSpeed leaves out a step whose gradient is not finite. One such batch is counted; where all are, it is the
        weights. `row` is the mean over all ranks, so they all judge alike.
        """
        if not math.isfinite(row["train/loss"]):
            return "the loss or the gradient is not finite"
        before = [old["train/loss"] for old in self.curve[-_RECENT:]]
        spike = self.settings.spike
        if spike and len(before) == _RECENT and row["train/loss"] > spike * statistics.median(before):
            return f"the loss is more than {spike:g} times that of the {_RECENT} log lines before"
        return ""

    def _return(self, broken: str) -> None:
        """To the last committed state, and past the batches since: on all ranks, as they all saw the same."""
        stopped, position, returns = self.step, self.position, self.returns
        if len(returns) >= self.settings.returns:
            raise _diverged(broken, stopped, len(returns))
        self.saver.wait()
        if not self._resume():
            raise _diverged(broken, stopped, 0)
        self.publisher.take_back(self.step)
        self.position = position
        self.returns = [*returns, states.Return(at=stopped, to=self.step, past=position)]
        self._tell(f"{broken} near step {stopped}: back to step {self.step}, and past the batches since then")

    def _log(self, row: dict[str, float]) -> None:
        if row["data/truncated_captions"] and not self.told_truncated:
            self._tell_truncated()
        self.curve.append({"step": self.step, "images": self.position, **row})
        if self.team.rank == 0:
            self.job.run.metrics(row, self.step)
            at = {"step": self.step, "steps": self.settings.steps, "images": self.position}
            self.send({"event": "log", **at, **row})

    def _tell_truncated(self) -> None:
        self.told_truncated = True
        tokens = self.settings.network().text_tokens
        text = f"some captions are cut, as they are longer than {tokens} tokens (model.text_tokens)"
        self.send({"event": "truncated", "text": f"{text}; data/truncated_captions counts them"})

    def _save(self) -> None:
        """Commit a state in the background, once all that it was trained on is known to be undamaged."""
        step = self.step
        first = self.publisher.before_state(step, self.position, list(self.curve))

        def then() -> None:
            self.job.run.flush()
            self.send({"event": "saved", "step": step, "checkpoint": self.publisher.exported(step)})

        facts = {"step": step, "position": self.position, "curve": list(self.curve), "returns": list(self.returns)}
        self.saver.begin(states.collected(self.engine, self.ema), facts, first, then)

    def publish(self) -> CheckpointRecord:
        """The EMA weights as a checkpoint folder, written by rank 0; the run's states are needed no more."""
        part = states.collected(self.engine, self.ema)
        record = self.publisher.publish(part, self.step, self.position, self.curve)

        def finish() -> None:
            self.job.check_claim()
            states.drop(self.job.store, self.job.prefix, keep=0)
            self.job.run.flush()

        self.team.on_rank_0(finish)
        return record

    def close(self) -> None:
        self.reader.close()


def _diverged(broken: str, step: int, returns: int) -> TrainingError:
    after = f", after {returns} returns to an earlier state" if returns else ""
    return TrainingError(
        f"{broken} near step {step}{after}",
        remedy="lower optim.lr, or set optim.clip: another setting is another run, from its start",
    )


def _shard(networks: Networks, settings: TrainSettings, ranks: int) -> Engine:
    share = settings.batch // ranks
    micro = min(settings.micro_batch or share, share)
    return Engine(
        networks.trained,
        settings.optim,
        zero=settings.zero,
        offload=settings.offload,
        exact_gradients=settings.exact_gradients,
        precision=settings.precision,
        micro_batch=micro,
        accumulate=share // micro,
    )


def _preparer(networks: Networks, settings: TrainSettings, device: torch.device) -> Preparer:
    perceptual, config = networks.trained.perceptual, networks.trained.net.config
    lpips = perceptual.lpips if perceptual is not None else None
    for encoder in (networks.frozen_text, networks.vision, lpips):
        if encoder is not None:
            encoder.to(device)
    return Preparer(device, networks.frozen_text, networks.vision, config, settings.objective)


def _validation(job: Job, networks: Networks, team: Team, prepare: Preparer) -> Validation | None:
    if not job.settings.validation.every:
        return None
    if not job.snapshot.held_out_rows:
        raise SettingsError(
            "validation.every is set, but the snapshot holds no samples out",
            remedy="set held_out in the snapshot's stage, or validation.every to 0",
        )
    # One lane and one window, so that they lie in few shards: these are fetched whole, to be checked.
    count, seed = job.settings.validation.batches, job.settings.seed
    reading = job.settings.reading.model_copy(update={"lanes": 1, "window": count * job.settings.batch})
    settings = job.settings.model_copy(update={"reading": reading})
    with closing(_reader(job, job.snapshot.held_out)) as reader:
        batches = _batches(reader, networks, settings, team, torch.device("cpu"), partial(draw_evenly, seed))
        validation = Validation(batches, count, prepare)
        reader.settle()
        return validation


def _perf(networks: Networks, settings: TrainSettings, device: torch.device) -> Perf:
    flop = flop_per_image(networks.trained.net.config, networks.text, networks.vision, settings)
    return Perf(flop, peak(settings.peak_tflops, settings.precision, device), device)


def _reader(job: Job, rows: DataObject) -> Reader:
    reading = job.settings.reading
    folder = cache.Folder(reading.cache or job.cache, reading.cache_gb)
    selection = Selection.open(job.store, rows, folder)
    return Reader(selection, cache.Tars(job.store, folder))


def _batches(
    reader: Reader, networks: Networks, settings: TrainSettings, team: Team, device: torch.device, drawing: Drawing
) -> Batches:
    text = networks.text
    condition = Labels(reader, settings.network().classes) if text is None else Captions(reader, text.tokenize)
    return Batches(
        reader,
        settings.reading,
        batch=settings.batch,
        draw=drawing,
        condition=condition,
        rank=team.rank,
        ranks=team.size,
        seed=settings.seed,
        device=device,
    )


def _publisher(job: Job, origins: Origins, sizes: list[tuple[int, int]], engine: Engine, team: Team) -> Publisher:
    settings, start = job.settings, job.start_from
    return Publisher(
        job.store,
        job.prefix,
        team,
        job.check_claim,
        facts={
            "run": job.digest,
            "snapshot": job.snapshot.digest(),
            "start_from": start.digest() if start is not None else None,
        },
        frame=lambda: Frame.of(settings.network(), origins.text, trained=settings.train_text > 0, sizes=sizes),
        shapes=engine.shapes,
        ema=settings.ema,
        every=settings.export_every,
        steps=settings.steps,
    )

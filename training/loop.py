"""A training run from the snapshot to the published checkpoint; every rank runs `train`.

    build or inherit the network -> shard it -> resume from the newest committed state -> steps, each followed by an EMA
    update -> a state committed every `save_every` steps -> the EMA weights as a checkpoint, its record last

Only rank 0 asks the store for the run's states, and broadcasts what it reads; the ranks compare what they are about to
do. So two drivers on one run at the same time cannot make a model of mixed steps. Data order, noise, times and dropped
captions depend on the position alone, so a resumed run, on any number of ranks, continues the same sequence of samples.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from safetensors.torch import save_file

from infra import layout
from infra.claim import Claim
from infra.config import Refused, Settings, check, operational
from infra.errors import SettingsError, TrainingError
from infra.records import CheckpointRecord, DataObject, SnapshotRecord, put_data
from infra.shards import read_selection
from infra.store import Store
from infra.tracking import Run
from training import checkpoint
from training import model as models
from training.ema import Ema, EmaSettings
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.engine import Engine, Precision
from training.loader.batches import Batch, Batches
from training.loader.order import DataSettings
from training.loader.reader import Reader
from training.meter import Meter
from training.model.compiled import compile_network
from training.model.pixnerd import PixNerd
from training.model.presets import ModelConfig, preset, training_settings
from training.model.repa_head import RepaHead
from training.optim import OptimSettings, learning_rate
from training.step import ObjectiveSettings, Preparer, Trained
from training.team import Team

Files = dict[str, DataObject]  # by path in the folder that they make up


class TrainSettings(Settings):
    preset: str = "XXL/16-dct"
    model: dict[str, Any] = Field(default_factory=dict, description="what differs from the preset")
    steps: int = Field(ge=1)
    batch: int = Field(ge=1, description="images a step, over all ranks")
    seed: int = Field(0, ge=0)
    precision: Precision = "bf16"
    optim: OptimSettings = OptimSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    ema: EmaSettings = EmaSettings()
    reading: DataSettings = DataSettings()
    train_text: int = Field(0, ge=0, description="layers of the text encoder, from its last, to train along")

    workers: int = operational(1, ge=1, description="ranks: GPUs, or processes on CPUs")
    micro_batch: int | None = operational(None, ge=1, description="images a rank takes at once; none: its whole share")
    zero: Literal[1, 2] = operational(1)
    compile: bool = operational(False, description="let torch.compile build the network: minutes first, then faster")
    log_every: int = operational(20, ge=1)
    save_every: int = operational(500, ge=1, description="steps between committed states; a multiple of log_every")
    retries: int = operational(2, ge=0, description="restarts after a worker died")

    @model_validator(mode="before")
    @classmethod
    def _with_preset_defaults(cls, settings: Any) -> Any:
        return training_settings(settings) if isinstance(settings, dict) else settings

    @field_validator("preset")
    @classmethod
    def _is_a_preset(cls, name: str) -> str:
        try:
            preset(name)
        except SettingsError as error:
            raise Refused(error.message, remedy=error.remedy) from None
        return name

    @field_validator("model")
    @classmethod
    def _fits_the_preset(cls, changes: dict[str, Any], settings: ValidationInfo) -> dict[str, Any]:
        if "preset" in settings.data:
            check(ModelConfig, preset(settings.data["preset"]).model_dump() | changes)
        return changes

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        share = self.batch // self.workers
        if self.batch % self.workers or share % (self.micro_batch or share):
            raise ValueError("batch must be a multiple of workers x micro_batch")
        if self.reading.lanes % self.workers:
            raise ValueError(f"reading.lanes ({self.reading.lanes}) must be a multiple of workers ({self.workers})")
        if self.save_every % self.log_every:
            raise ValueError("save_every must be a multiple of log_every")
        network = self.network()
        if network.task != "text":
            raise ValueError("only text-to-image networks are trained here; this one draws from labels")
        if network.image_size is None:
            raise ValueError("model.image_size must be the size that is trained at")
        if self.objective.repa and self.objective.repa_block > network.blocks:
            raise ValueError(
                f"objective.repa_block is {self.objective.repa_block}, but there are {network.blocks} blocks"
            )
        if self.objective.repa and (self.micro_batch or share) < 2:
            raise ValueError("REPA's control needs at least two images in a micro-batch")
        return self

    def network(self) -> ModelConfig:
        return ModelConfig(**(preset(self.preset).model_dump() | self.model))


@dataclass
class Job:
    """One training run: what `train` needs on every rank. It is pickled to the workers."""

    store: Store
    prefix: str  # of the keys of all that it stores
    digest: str  # of the run
    settings: TrainSettings
    snapshot: SnapshotRecord
    text: Files | str  # a text encoder's files in the store, or the name of a published one
    vision: Files | str | None
    start_from: CheckpointRecord | None
    run: Run
    claim: Claim | None = None  # the driver's, if several drivers may start this run
    scratch: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))  # for temporary files

    def check_claim(self) -> None:
        if self.claim is not None:
            self.claim.check()


Send = Callable[[dict[str, Any]], None]  # takes progress messages such as {"event": "saved", "step": 500}


def train(job: Job, send: Send) -> CheckpointRecord:
    """Runs on every rank, with `torch.distributed` initialised."""
    team = Team()
    if (done := team.on_rank_0(lambda: checkpoint.published(job.store, job.prefix))) is not None:
        return done
    settings = job.settings
    attempt = team.on_rank_0(lambda: uuid.uuid4().hex[:12])
    folder = Path(tempfile.mkdtemp(prefix="pixnerd-train-", dir=job.scratch))
    try:
        networks = _build(job, folder)
        engine = _shard(networks, settings, team.size)
        ema = Ema(engine.masters, settings.ema)
        state = checkpoint.resume(
            job.store, job.prefix, team, engine, ema, lambda text: send({"event": "told", "text": text})
        )
        step, position, curve = (state.step, state.position, list(state.curve)) if state else (0, 0, [])
        send({"event": "start", "step": step, "steps": settings.steps})
        reader = Reader(job.store, read_selection(job.store, job.snapshot), folder, settings.seed)
        batches = Batches(
            reader, settings.reading, batch=settings.batch, rank=engine.rank, ranks=engine.ranks, seed=settings.seed
        ).iterate(position)

        def save(step: int) -> None:
            checkpoint.save_state(
                job.store,
                job.prefix,
                team,
                engine,
                ema,
                run=job.digest,
                attempt=attempt,
                step=step,
                position=step * settings.batch,
                curve=curve,
                allowed=job.check_claim,
            )
            job.run.flush()
            send({"event": "saved", "step": step})

        try:
            _steps(job, networks, engine, ema, batches, step, curve, send, save)
        finally:
            batches.close()
            reader.close()
        return _publish(job, networks, team, engine, ema, curve)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Networks:
    trained: Trained
    text: TextEncoder
    text_folder: Path | None  # the files of an encoder that came from the store or a folder; None: it is published
    frozen_text: TextEncoder | None  # None: it is trained
    vision: VisionEncoder | None


def _build(job: Job, folder: Path) -> Networks:
    """The denoiser, initialised from the seed or from another run's checkpoint, and its encoders."""
    settings = job.settings
    torch.manual_seed(settings.seed)
    net = PixNerd(settings.network())
    source: Files | str = job.text
    inherited = None
    if job.start_from is not None:
        inherited = checkpoint.fetch(job.store, job.start_from, folder / "start")
        checkpoint.load_part(inherited / models.WEIGHTS, net, "the network")
        if (inherited / "text").exists():
            source = str(inherited / "text")
    text_folder = None
    if isinstance(source, dict):
        text_folder = checkpoint.fetch_files(job.store, source, folder / "text")
    elif Path(source).exists():
        text_folder = Path(source)
    text = TextEncoder(
        text_folder or str(source),
        net.config.text_tokens,
        train_layers=settings.train_text,
        rounded=net.config.round_text,
    )
    if text.width != net.config.text_dim:
        raise SettingsError(
            f"the text encoder's features are {text.width} wide, the network expects {net.config.text_dim}",
            remedy=f"set model.text_dim to {text.width}, or name another encoder",
        )
    vision = head = None
    if settings.objective.repa:
        if job.vision is None:
            raise SettingsError("objective.repa needs a vision encoder", remedy="name one, or set objective.repa to 0")
        if isinstance(job.vision, str):
            vision = VisionEncoder(job.vision)
        else:
            vision = VisionEncoder(checkpoint.fetch_files(job.store, job.vision, folder / "vision"))
        head = RepaHead(net.config.hidden, vision.width)
        if inherited is not None and (inherited / models.HEAD).exists():
            checkpoint.load_part(inherited / models.HEAD, head, "the REPA head")
    if settings.compile:
        compile_network(net)
    trained = Trained(net, head, text if settings.train_text else None, settings.objective)
    return Networks(trained, text, text_folder, None if settings.train_text else text, vision)


def _shard(networks: Networks, settings: TrainSettings, ranks: int) -> Engine:
    share = settings.batch // ranks
    micro = min(settings.micro_batch or share, share)
    return Engine(
        networks.trained,
        settings.optim,
        zero=settings.zero,
        precision=settings.precision,
        micro_batch=micro,
        accumulate=share // micro,
    )


def _steps(
    job: Job,
    networks: Networks,
    engine: Engine,
    ema: Ema,
    batches: Iterator[Batch],
    first: int,
    curve: list[dict[str, float]],
    send: Send,
    save: Callable[[int], None],
) -> None:
    settings, meter = job.settings, Meter()
    for encoder in (networks.frozen_text, networks.vision):
        if encoder is not None:
            encoder.to(engine.device)
    grid = (networks.trained.net.config.grid,) * 2
    prepare = Preparer(settings.objective, settings.seed, engine.device, networks.frozen_text, networks.vision, grid)
    clock = time.perf_counter()
    for step in range(first, settings.steps):
        wait_began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - wait_began
        rate = learning_rate(settings.optim, step, settings.steps)
        reports, norm = engine.step(map(prepare, batch.split(engine.micro_batch)), rate)
        meter.add(reports, norm, waited)
        ema.update(engine.masters, step)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            row, meter = meter.read(engine.ranks, seconds, rate), Meter()
            _log(job, engine, row, done, curve, send)
        if done % settings.save_every == 0 and done < settings.steps:
            save(done)


def _log(job: Job, engine: Engine, row: dict[str, float], step: int, curve: list[dict[str, float]], send: Send) -> None:
    if not all(map(math.isfinite, row.values())):
        raise TrainingError(
            f"the loss or the gradient is not finite near step {step}",
            remedy="lower optim.lr, or set optim.clip: another setting is another run, from its start",
        )
    curve.append({"step": step, "images": step * job.settings.batch, **row})
    if engine.rank == 0:
        job.run.metrics(row, step)
        send({"event": "log", "step": step, "steps": job.settings.steps, **row})


def _publish(
    job: Job, networks: Networks, team: Team, engine: Engine, ema: Ema, curve: list[dict[str, float]]
) -> CheckpointRecord:
    """Publish the EMA weights, gathered on rank 0, as a checkpoint; then delete the run's training states."""
    settings = job.settings
    weights = engine.gather(ema.shards)

    def write(folder: Path) -> None:
        _load_weights(networks.trained, weights)
        own_text = networks.text_folder is not None or settings.train_text > 0
        models.save(folder, networks.trained.net, {"text_encoder": "text" if own_text else job.text})
        if own_text:
            networks.text.save(folder / "text")
        if networks.trained.head is not None:
            save_file(networks.trained.head.state_dict(), folder / models.HEAD)
        models.write_sums(folder)

    def publish() -> CheckpointRecord:
        job.check_claim()
        record = checkpoint.publish(
            job.store,
            job.prefix,
            write,
            run=job.digest,
            step=settings.steps,
            position=settings.steps * settings.batch,
            snapshot=job.snapshot.digest(),
            start_from=job.start_from.digest() if job.start_from is not None else None,
            parameters=sum(p.numel() for p in networks.trained.net.parameters()),
            curve=_store_curve(job, curve),
        )
        checkpoint.drop_states(job.store, job.prefix, kept=0)
        job.run.flush()
        return record

    return team.on_rank_0(publish)


def _load_weights(trained: Trained, weights: dict[str, torch.Tensor]) -> None:
    """Replace the module's parameters by EMA weights, as training is over and its parts save themselves."""
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name in weights:
                parameter.data = weights[name].to(torch.float32)


def _store_curve(job: Job, curve: list[dict[str, float]]) -> DataObject:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.parquet"
        pq.write_table(pa.Table.from_pylist(curve), path)
        return put_data(job.store, layout.CURVES.at(home=job.prefix), "curve.parquet", path)

"""A training run on a Ray cluster: Ray Train starts the ranks; when one dies or hangs, the driver starts all again.

The result is the record in the store; Ray's own checkpoints are not used. A rank writes to one folder of its machine's
disk only, which a later run removes if the rank was killed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from infra import guard, layout, scratch
from infra.background import repeated
from infra.causes import explained
from infra.claim import held
from infra.cluster import Channel, started_here
from infra.errors import ClusterError, PixnerdError, SettingsError, StoreError, TrainingError
from infra.records import CheckpointRecord
from training import checkpoint
from training.job import Job

Show = Callable[[dict[str, Any]], None]
_ABORT_SECONDS = 4.0
_COMMIT_SECONDS = 6.0  # in which the ranks of a stopped run may come to a log line and commit a state
_ASK_SECONDS = 1.0  # between rank 0's questions whether the run is stopped
_PAUSE_SECONDS = 5.0  # before another attempt: what has just died may take others along
_OF_A_DEAD_PEER = ("connection", "socket", "nccl", "timed out", "peer")  # words of PyTorch's exchanges


def fit(job: Job, show: Show) -> CheckpointRecord:
    """Trains to the end, or raises; `show` gets rank 0's messages while it runs.

    If several drivers call it for the same run, one trains and the others wait until it has published or ended.
    """
    published = partial(checkpoint.published, job.store, job.prefix)

    def waiting(host: str) -> None:
        show({"event": "waiting", "host": host})

    with held(job.store, job.prefix, lambda: published() is not None, waiting) as claim:
        if claim is not None:
            _fit(replace(job, claim=claim), show)
    record = published()
    assert record is not None, "training ended without a checkpoint"
    return record


def _fit(job: Job, show: Show) -> None:
    """Attempt after attempt, each from the last committed state; the allowance is renewed by each state."""
    left = job.settings.retries
    while True:
        news = _News(show)
        try:
            _attempt(job, news)
            return
        except PixnerdError as error:
            left = job.settings.retries if news.committed else left
            if repeats(error) or not left:
                raise
            text = f"{error.message}; starting again from the last committed state (attempts left: {left})"
            show({"event": "told", "text": text})
            left -= 1
            time.sleep(_PAUSE_SECONDS)
            if isinstance(error, StoreError):
                _wait_for(job)


def _wait_for(job: Job) -> None:
    """Returns when the store answers, or after the watchdog's time: attempts before that would be wasted.

    Each question is patient by itself, and tells of the outage.
    """
    deadline = time.monotonic() + job.settings.hang_after
    while time.monotonic() < deadline:
        with suppress(StoreError):
            job.store.exists(layout.CHECKPOINT.at(home=job.prefix))
            return
        time.sleep(_PAUSE_SECONDS)


class _News:
    """Passes messages on, and remembers what decides about another attempt."""

    def __init__(self, show: Show) -> None:
        self._show, self.committed, self.hung = show, False, dict[int, str]()
        self.training, self.stopped = threading.Event(), threading.Event()

    def __call__(self, message: dict[str, Any]) -> None:
        self.committed |= message["event"] == "saved"
        if message["event"] == "start":
            self.training.set()
        if message["event"] == "stopped":
            self.stopped.set()
        if message["event"] == "hung":
            self.hung[message["rank"]] = message["text"]
        else:
            self._show(message)


class Interrupted(TrainingError):
    """What may go well another time: a rank that died, or that stood still."""


def repeats(error: PixnerdError) -> bool:
    """Whether another attempt would come to the same: a fault of settings, data or code."""
    return not isinstance(error, Interrupted | StoreError | ClusterError)


def _attempt(job: Job, news: _News) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    gpu = wants_gpus(job.settings.device, job.settings.workers, ray.cluster_resources().get("GPU", 0))
    channel = Channel()
    with scratch.folder("ray") as folder, channel.watched(news):
        trainer = _trainer()(
            _worker,
            train_loop_config={"job": job, "channel": channel},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=job.settings.workers, use_gpu=gpu),
            run_config=RunConfig(name="train", storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
            return
        except KeyboardInterrupt:
            if news.training.is_set():
                guard.more_time(_COMMIT_SECONDS)
                channel.ask_to_end()
                news.stopped.wait(_COMMIT_SECONDS)
            trainer.abort()
            raise
        except Exception as error:  # noqa: BLE001 - Ray wraps what a worker raised; ours is taken out again below
            failure = error
    raise (_stood_still(job, news.hung) if news.hung else _cause(failure)) from failure


def wants_gpus(device: str, workers: int, gpus: float) -> bool:
    """The cluster's GPUs count: the driver may well have none."""
    if device == "cpu" or (device == "auto" and not gpus):
        return False
    if workers > gpus:
        raise SettingsError(
            f"{workers} workers need as many GPUs, and the cluster has {gpus:g}",
            remedy="set workers to that number, or device to cpu",
        )
    return True


def _stood_still(job: Job, hung: dict[int, str]) -> Interrupted:
    silent = [str(rank) for rank in range(job.settings.workers) if rank not in hung]
    if silent:
        hung[-1] = f"nothing was heard of rank {', '.join(silent)}"
    return Interrupted(
        f"training stood still ({'; '.join(text for _, text in sorted(hung.items()))})",
        remedy="look at the machine of the rank that is elsewhere than the others; hang_after sets the limit",
    )


def _trainer() -> Any:
    """Ray's trainer, changed so that it can be aborted and installs no signal handler in this process.

    Each process that Ray starts beside the ranks takes 5 to 7 seconds of a core, at every attempt. So there is none for
    Ray's datasets, which are not used, and on a cluster of this process none to clean up behind it once it is dead.
    """
    import ray
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

        def _create_default_callbacks(self) -> list[Any]:
            left_out = {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if started_here() else [])}
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in left_out]

        def abort(self) -> None:
            """End the ranks within a few seconds; those that still run end with the cluster or with this driver."""
            if self.controller is not None:
                with suppress(ray.exceptions.RayError):  # raised because the controller ends itself
                    ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)

    return Trainer


def _worker(config: dict[str, Any]) -> None:
    from training.engine import prepare_environment

    prepare_environment()
    scratch.sweep()
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    import ray.train
    import torch

    from training.loader.cache import default_folder
    from training.loop import train

    if not torch.cuda.is_available():
        # Ranks of one machine share its cores; more threads than cores would only wait for each other.
        beside = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    job: Job = config["job"]
    channel: Channel = config["channel"]
    rank = torch.distributed.get_rank()

    def send(message: dict[str, Any]) -> None:
        if rank == 0 or message["event"] in ("hung", "unreadable"):
            channel.send(message)

    cache = default_folder()  # asked before the run's temporary files get a folder of their own, which goes with it
    asked = threading.Event()

    def ask() -> None:
        if rank == 0 and channel.asked_to_end():
            asked.set()

    def ends_soon() -> bool:
        return ray.train.get_preemption_info() is not None

    with (
        scratch.folder("train") as folder,
        scratch.everything_in(folder),
        repeated(ask, _ASK_SECONDS, "asked", longest_end=_ASK_SECONDS),
    ):
        train(replace(job, scratch=folder, cache=cache, ends_soon=ends_soon, stopped=asked.is_set), send)


def _cause(error: BaseException) -> PixnerdError:
    """The pixnerd error inside of what Ray raised, or the last line of Ray's message as one."""
    if ours := explained(error):
        return ours
    last = str(error).strip().splitlines() or [type(error).__name__]
    kind = Interrupted if _of_a_death(error) else TrainingError
    return kind(
        f"training stopped ({last[-1][:300]})",
        remedy="run again: it resumes from the last committed state; --debug shows the whole error",
    )


def _of_a_death(error: BaseException) -> bool:
    """Whether a rank died, or only heard of another one's death, rather than met a mistake in the code."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    said = [f"{type(failure).__module__} {failure}".lower() for failure in failures]
    return all(text.startswith("ray.") or any(word in text for word in _OF_A_DEAD_PEER) for text in said)

"""A training run on a Ray cluster: Ray Train starts the ranks, each runs the loop, a dead one brings all of them back.

The record in the store is the result; nothing is uploaded through Ray's own checkpoints. All that a rank writes to its
machine's disk lies in one folder, which a later run removes if the rank was killed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from infra import scratch
from infra.causes import explained
from infra.claim import held
from infra.cluster import Channel
from infra.errors import PixnerdError, TrainingError
from infra.records import CheckpointRecord
from training import checkpoint
from training.loop import Job

_ABORT_SECONDS = 4.0


def fit(job: Job, show: Callable[[dict[str, Any]], None]) -> CheckpointRecord:
    """Trains to the end, or raises; `show` gets rank 0's progress while it runs.

    Of several drivers one trains, and the others wait for its checkpoint, or for its end.
    """

    def done() -> bool:
        return checkpoint.published(job.store, job.prefix) is not None

    def waiting(host: str) -> None:
        show({"event": "waiting", "host": host})

    with held(job.store, job.prefix, done, waiting) as claim:
        if claim is not None:
            _fit(replace(job, claim=claim), show)
    record = checkpoint.published(job.store, job.prefix)
    assert record is not None, "training ended without a checkpoint"
    return record


def _fit(job: Job, show: Callable[[dict[str, Any]], None]) -> None:
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    gpu = torch.cuda.is_available()
    channel = Channel()
    with scratch.folder("ray") as folder, channel.watched(show):
        trainer = _trainer()(
            _worker,
            train_loop_config={"job": job, "channel": channel, "threads": None if gpu else _threads(job)},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=job.settings.workers, use_gpu=gpu),
            run_config=RunConfig(
                name="train", storage_path=str(folder), failure_config=FailureConfig(max_failures=job.settings.retries)
            ),
        )
        try:
            trainer.fit()
        except KeyboardInterrupt:
            trainer.abort()
            raise
        except Exception as error:  # Ray wraps what a worker raised; ours is taken out again below
            raise _cause(error) from error


def _trainer() -> Any:
    """Ray's trainer, except that it can be stopped from outside and leaves this process's signals alone."""
    import ray
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

        def abort(self) -> None:
            """End the ranks, within a few seconds; what then still runs ends with the cluster or with its driver."""
            if self.controller is not None:
                with suppress(ray.exceptions.RayError):  # it says that it is gone
                    ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)

    return Trainer


def _threads(job: Job) -> int:
    """CPU ranks share this machine's cores; more threads than cores would only wait for each other."""
    return max(1, len(os.sched_getaffinity(0)) // job.settings.workers)


def _worker(config: dict[str, Any]) -> None:
    from training.engine import prepare_environment

    prepare_environment()
    scratch.sweep()
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    import torch

    from training.loop import train

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    job: Job = config["job"]
    channel: Channel = config["channel"]
    silent = torch.distributed.get_rank() != 0
    with scratch.folder("train") as folder, scratch.everything_in(folder):
        train(replace(job, scratch=folder), (lambda message: None) if silent else channel.send)


def _cause(error: BaseException) -> PixnerdError:
    """The error of ours inside of what Ray raised, or what Ray says in one line."""
    if found := explained(error):
        return found
    last = str(error).strip().splitlines() or [type(error).__name__]
    return TrainingError(
        f"training stopped ({last[-1][:300]})",
        remedy="run again: it resumes from the last committed state; --debug shows the whole error",
    )

"""A training run on a Ray cluster: Ray Train starts the ranks, each runs the loop, a dead one brings all of them back.

The record in the store is the result; nothing is uploaded through Ray's own checkpoints.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from infra.claim import held
from infra.cluster import Channel
from infra.errors import PixnerdError, TrainingError
from infra.records import CheckpointRecord
from training import checkpoint
from training.loop import Job


def fit(job: Job, show: Callable[[dict[str, Any]], None]) -> CheckpointRecord:
    """Trains to the end, or raises; `show` gets rank 0's progress while it runs.

    Of several drivers one trains, and the others wait for its checkpoint, or for its end.
    """

    def done() -> bool:
        return checkpoint.published(job.store, job.prefix) is not None

    def waiting(host: str) -> None:
        show({"event": "waiting", "host": host})

    with held(job.store, f"{job.prefix}/drivers", done, waiting) as claim:
        if claim is not None:
            _fit(replace(job, claim=claim), show)
    record = checkpoint.published(job.store, job.prefix)
    assert record is not None, "training ended without a checkpoint"
    return record


def _fit(job: Job, show: Callable[[dict[str, Any]], None]) -> None:
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = torch.cuda.is_available()
    channel = Channel()
    with tempfile.TemporaryDirectory(prefix="pixnerd-ray-") as folder, channel.watched(show):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"job": job, "channel": channel, "threads": None if gpu else _threads(job)},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=job.settings.workers, use_gpu=gpu),
            run_config=RunConfig(
                name="train", storage_path=folder, failure_config=FailureConfig(max_failures=job.settings.retries)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what a worker raised; ours is taken out again below
            raise _cause(error) from error


def _threads(job: Job) -> int:
    """CPU ranks share this machine's cores; more threads than cores would only wait for each other."""
    return max(1, len(os.sched_getaffinity(0)) // job.settings.workers)


def _worker(config: dict[str, Any]) -> None:
    from training.engine import prepare_environment

    prepare_environment()
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    import torch

    from training.loop import train

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    job: Job = config["job"]
    channel: Channel = config["channel"]
    silent = torch.distributed.get_rank() != 0
    train(job, (lambda message: None) if silent else channel.send)


def _cause(error: BaseException) -> PixnerdError:
    """The error of ours inside of what Ray raised, or what Ray says in one line."""
    seen: list[BaseException] = [error]
    while seen:
        here = seen.pop()
        if isinstance(here, PixnerdError):
            return here
        seen += [e for e in (here.__cause__, here.__context__, getattr(here, "cause", None)) if e is not None]
        seen += list(getattr(here, "worker_failures", {}).values())
    last = str(error).strip().splitlines() or [type(error).__name__]
    return TrainingError(
        f"training stopped ({last[-1][:300]})",
        remedy="run again: it resumes from the last committed state; --debug shows the whole error",
    )

"""A training run on a Ray cluster: Ray Train starts the ranks, and restarts all of them when one dies.

The result is the record in the store; Ray's own checkpoints are not used. A rank writes to one folder of its machine's
disk only, which a later run removes if the rank was killed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
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
        except Exception as error:  # Ray wraps what a worker raised
            raise _cause(error) from error


def _trainer() -> Any:
    """Ray's trainer, changed so that it can be aborted and installs no signal handler in this process."""
    import ray
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

        def abort(self) -> None:
            """End the ranks within a few seconds; those that still run end with the cluster or with this driver."""
            if self.controller is not None:
                with suppress(ray.exceptions.RayError):  # raised because the controller ends itself
                    ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)

    return Trainer


def _threads(job: Job) -> int:
    """Threads of a CPU rank: the ranks share this machine's cores, and more threads than cores would be slower."""
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
    """The pixnerd error inside of what Ray raised, or the last line of Ray's message as one."""
    if ours := explained(error):
        return ours
    last = str(error).strip().splitlines() or [type(error).__name__]
    return TrainingError(
        f"training stopped ({last[-1][:300]})",
        remedy="run again: it resumes from the last committed state; --debug shows the whole error",
    )

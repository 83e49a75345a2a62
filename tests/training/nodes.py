"""A training run on a Ray of several nodes, of which one dies: `python -m tests.training.nodes JOB`, a pickled one.

It prints what it was told and what came out.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from tests.nodes import joined
from training import ray_train
from training.job import Job
from training.model import WEIGHTS


def main() -> None:
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    told, weights = trained(job)
    print(json.dumps({"told": told, "weights": weights}))


def trained(job: Job) -> tuple[list[str], str]:
    """What was told, and the hash of the weights. Of three nodes with room for a rank, one with a rank dies."""
    told: list[str] = []
    with joined(3) as nodes:

        def show(message: dict[str, Any]) -> None:
            if message["event"] == "told":
                told.append(message["text"])
            if message["event"] == "log" and message["step"] >= 8 and len(nodes.left) == 3:
                assert nodes.kill_one_with(b"ray::RayTrainWorker")

        return told, ray_train.fit(job, show).files[WEIGHTS].sha256


if __name__ == "__main__":
    main()

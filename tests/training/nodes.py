"""A training run on a Ray of several nodes, of which one dies: `python -m tests.training.nodes JOB`, a pickled one.

It is a process of its own, since a process can join one Ray only. It prints what it was told and what came out.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra import guard
from infra.ray_head import own_token
from training import ray_train
from training.job import Job
from training.model import WEIGHTS

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def main() -> None:
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_worker_niceness": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    own_token()
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    # Short, since sockets in it have at most 107 characters; the cluster notes its address in `ray/` there.
    with tempfile.TemporaryDirectory(prefix="pn-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        os.environ["RAY_TMPDIR"] = folder
        told, weights = trained(job)
    print(json.dumps({"told": told, "weights": weights}))


def trained(job: Job) -> tuple[list[str], str]:
    """What was told, and the hash of the weights. Of three nodes with room for a rank, one with a rank dies."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    nodes = [cluster.add_node(**NODE) for _ in range(3)]  # here, as only the main thread may start one
    told: list[str] = []

    def show(message: dict[str, Any]) -> None:
        if message["event"] == "told":
            told.append(message["text"])
        if message["event"] == "log" and message["step"] >= 8 and len(nodes) == 3:
            nodes.remove(dies := next(node for node in nodes if _has_rank(node)))
            cluster.remove_node(dies, allow_graceful=False)

    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        return told, ray_train.fit(job, show).files[WEIGHTS].sha256
    finally:
        ray.shutdown()
        cluster.shutdown()


def _has_rank(node: Any) -> bool:
    raylet = node.all_processes["raylet"][0].process.pid
    commands = (Path(f"/proc/{pid}/cmdline") for pid in guard.children(raylet))
    return any(command.read_bytes().startswith(b"ray::RayTrainWorker") for command in commands)


if __name__ == "__main__":
    main()

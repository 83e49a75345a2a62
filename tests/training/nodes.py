"""A training run on a Ray of two nodes, of which one dies: `python -m tests.training.nodes JOB`, a pickled one.

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

from training import ray_train
from training.job import Job
from training.model import WEIGHTS

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def main() -> None:
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_worker_niceness": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    import ray
    from ray.cluster_utils import Cluster

    from infra.ray_head import own_token

    own_token()
    job: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    with tempfile.TemporaryDirectory(prefix="pn-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"temp_dir": folder})
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)]
        told: list[str] = []

        def show(message: dict[str, Any]) -> None:
            if message["event"] == "told":
                told.append(message["text"])
            if message["event"] == "log" and message["step"] >= 8 and nodes:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            record = ray_train.fit(job, show)
        finally:
            ray.shutdown()
            cluster.shutdown()
    print(json.dumps({"told": told, "weights": record.files[WEIGHTS].sha256}))


if __name__ == "__main__":
    main()

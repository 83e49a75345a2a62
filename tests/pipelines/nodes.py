"""An evaluation on a Ray of several nodes, of which some die: `python -m tests.pipelines.nodes STORE CHECKPOINT_KEY`.

It is a process of its own, since a process can join one Ray only. It prints how many nodes died.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from infra import guard
from infra.ray_head import own_token
from infra.records import CheckpointRecord, read_record
from infra.store import open_store
from pipelines.evaluation.run import geneval
from tests.pipelines.test_evaluation import STAGE, settings

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def main() -> None:
    os.environ |= {"RAY_worker_niceness": "0"}
    own_token()
    # Short, since sockets in it have at most 107 characters; the cluster notes its address in `ray/` there.
    with tempfile.TemporaryDirectory(prefix="pn-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        os.environ["RAY_TMPDIR"] = folder
        print(evaluated(sys.argv[1], sys.argv[2]))


def evaluated(url: str, key: str) -> int:
    """How many nodes died: one in drawing and one in judging, of those that had an actor."""
    import ray
    from ray.cluster_utils import Cluster

    store = open_store(url)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    nodes = [cluster.add_node(**NODE) for _ in range(4)]  # here, as only the main thread may start one
    died: list[str] = []

    def show(text: str, done: int, total: int) -> None:
        noun = text.partition(" of ")[2].partition(" ")[2]
        if noun not in died and done < total and (dies := next(filter(_has_actor, nodes), None)) is not None:
            nodes.remove(dies)
            died.append(noun)
            cluster.remove_node(dies, allow_graceful=False)

    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        geneval(store, STAGE, read_record(store, key, CheckpointRecord), settings(workers=2), show)
        return len(died)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _has_actor(node: Any) -> bool:
    raylet = node.all_processes["raylet"][0].process.pid
    commands = (Path(f"/proc/{pid}/cmdline") for pid in guard.children(raylet))
    return any(command.read_bytes().startswith(b"ray::_Actor") for command in commands)


if __name__ == "__main__":
    main()

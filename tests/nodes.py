"""A Ray of several nodes in this process, of which some die. A process can join one Ray only, so it needs its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import guard
from infra.ray_head import own_token

_NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


class Nodes:
    def __init__(self, cluster: Any, count: int) -> None:
        self._cluster = cluster
        self.left = [cluster.add_node(**_NODE) for _ in range(count)]  # here, as only the main thread may start one

    def kill_one_with(self, worker: bytes) -> bool:
        """Kill a node that runs such a worker; whether there is one."""
        for node in self.left:
            if _has(node, worker):
                self.left.remove(node)
                self._cluster.remove_node(node, allow_graceful=False)
                return True
        return False


@contextmanager
def joined(count: int) -> Iterator[Nodes]:
    """A cluster that this process has joined: a head without CPUs, and so many nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_worker_niceness": "0"}
    own_token()
    # Short, since sockets in it have at most 107 characters; the cluster notes its address in `ray/` there.
    with tempfile.TemporaryDirectory(prefix="pn-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster(initialize_head=True, head_node_args=_NODE | {"num_cpus": 0})
        try:
            nodes = Nodes(cluster, count)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield nodes
        finally:
            ray.shutdown()
            cluster.shutdown()


def _has(node: Any, worker: bytes) -> bool:
    raylet = node.all_processes["raylet"][0].process.pid
    commands = (Path(f"/proc/{pid}/cmdline") for pid in guard.children(raylet))
    return any(command.read_bytes().startswith(worker) for command in commands)

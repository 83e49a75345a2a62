"""The systems around a run, as users start them: `mlflow server` and `ray start --head`, on free loopback ports.

Each lives in a folder of its own, and all its processes end with the context.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


class DidNotStart(Exception):
    pass


PATIENCE = 250.0  # seconds to come up, beside whatever else this machine does
COMMANDS = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def mlflow_server() -> Iterator[str]:
    """The URL of a server with a database and artifacts of its own, started without any special flags."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="pn-mlflow-") as name:
        command = [str(COMMANDS / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        places = ["--backend-store-uri", f"sqlite:///{name}/db", "--artifacts-destination", f"{name}/artifacts"]
        settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        url = f"http://127.0.0.1:{port}"
        with _running([*command, *places], os.environ | settings, Path(name), lambda: _healthy(url)):
            yield url


@contextmanager
def ray_head(environment: Mapping[str, str]) -> Iterator[str]:
    """The address of a head whose processes see this environment."""
    with ExitStack() as stack:
        for tries_left in (2, 1, 0):
            try:
                yield stack.enter_context(_ray_head(environment))
                return
            except DidNotStart:  # Ray gives itself 30 s, in which a busy machine does little
                if not tries_left:
                    raise


@contextmanager
def _ray_head(environment: Mapping[str, str]) -> Iterator[str]:
    flags = ["port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    flags += ["runtime-env-agent-port", "metrics-export-port", "node-manager-port", "object-manager-port"]
    ports = dict(zip(flags, free_ports(len(flags)), strict=True))
    folder = Path(tempfile.mkdtemp(prefix="pn-", dir="/tmp"))  # short: sockets in it have at most 107 characters
    try:
        command = [str(COMMANDS / "ray"), "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
        command += ["--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"]
        command += [f"--{flag}={number}" for flag, number in ports.items()]
        log = folder / "server.log"
        with _running(command, environment, folder, lambda: "Ray runtime started" in log.read_text()):
            yield f"127.0.0.1:{ports['port']}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return bool(opener.open(f"{url}/health", timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, up: Callable[[], bool]
) -> Iterator[None]:
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=file, stderr=file, process_group=0
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not up():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DidNotStart(log.read_text())
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

"""`pixnerd doctor`: what this machine lacks for the work, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import typer

from infra.errors import PixnerdError
from orchestration.options import JsonOption, StoreOption
from orchestration.patience import doing
from orchestration.terminal import print_json

PACKAGES = (
    *("ray", "torch", "deepspeed", "transformers", "mlflow", "boto3", "pyarrow"),
    *("webdataset", "simplejpeg", "open-clip-torch"),
)
LEAST_MEMORY = 8  # GiB that the demo needs
LEAST_DISK = 5  # GiB

app = typer.Typer()


class Finding(NamedTuple):
    what: str
    ok: bool
    found: str
    remedy: str = ""
    optional: bool = False


def _finding(what: str, ok: bool, found: str, remedy: str, *, optional: bool = False) -> Finding:
    return Finding(what, ok, found, "" if ok else remedy, optional)


@app.command(epilog="Example: pixnerd doctor --store s3://my-bucket/pixnerd")
def doctor(store: StoreOption = None, json_: JsonOption = False) -> None:
    """Say what is missing on this machine, and how to get it."""
    findings = examine(store)
    if json_:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"         -> {finding.remedy}")
    if not all(finding.ok or finding.optional for finding in findings):
        raise typer.Exit(1)


def examine(store: str | None) -> list[Finding]:
    doing("looking at this machine")
    findings = [_python(), *map(_package, PACKAGES), _compiler(), _deepspeed_op(), _memory(), _disk(), _shm(), _gpu()]
    if store is not None:
        findings.append(_store(store))
    return findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return _finding("Python", sys.version_info >= (3, 11), version, "install 3.11")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", "make setup, or pip install -c constraints.txt -e .")


def _compiler() -> Finding:
    path = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    remedy = "install one (Debian: apt-get install g++); DeepSpeed builds a small op with it"
    return _finding("C++ compiler", path is not None, path or "none", remedy)


def _deepspeed_op() -> Finding:
    from training.engine import extensions_folder

    folder = extensions_folder()
    built = any(folder.rglob("*.so")) if folder.is_dir() else False
    remedy = "python -m training.engine builds it in advance (a minute); else the first run does"
    return _finding("DeepSpeed's op", built, str(folder) if built else "not built yet", remedy, optional=True)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return _finding("memory", total >= LEAST_MEMORY * 0.9, f"{total:.0f} GiB", f"the demo needs {LEAST_MEMORY} GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return _finding("disk here", free >= LEAST_DISK, f"{free:.0f} GiB free", "free some space")


def _shm() -> Finding:
    """Ray keeps its objects there, and DeepSpeed's ranks exchange gradients through it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", True, "no /dev/shm; Ray uses " + tempfile.gettempdir(), optional=True)
    free = shutil.disk_usage(folder).free / 2**30
    remedy = "in a container: start it with --shm-size=1g"
    return _finding("shared memory", free >= 0.5, f"{free:.1f} GiB free", remedy)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", True, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", optional=True)
    return Finding("GPU", False, "none", "not needed for the demo; training at scale needs NVIDIA GPUs", optional=True)


def _store(url: str) -> Finding:
    from infra.store import open_store

    try:
        open_store(url).probe()
    except PixnerdError as error:
        return Finding(f"store {url}", False, error.message, error.remedy)
    return Finding(f"store {url}", True, "reachable; it honours create-if-absent")

"""Checkpoints, which finished runs leave. The data objects are written first, the record last.

<prefix>/checkpoint/<name>-<sha256>       config.json, model.safetensors (EMA), text/, repa head, SHA256SUMS
<prefix>/checkpoint.json                  the record of the checkpoint: the run is done
<prefix>/checkpoints/<step>.json          the same of a step on the way, with its files beside those above
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from infra import layout
from infra.config import digest
from infra.errors import CheckpointError, NotFound
from infra.files import sha256_of
from infra.records import CheckpointRecord, DataObject, fetch_data, put_data, read_record, write_record
from infra.store import Store
from training import model as models
from training.model.fit import differences, refuse, shapes


def publish(store: Store, prefix: str, write: Callable[[Path], None], key: str = "", **facts: Any) -> CheckpointRecord:
    """Store the files that `write(folder)` makes, then the record that names them: `key`, or that of a finished run."""
    key = key or layout.CHECKPOINT.at(home=prefix)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = path.relative_to(folder)
            key_prefix = "/".join([layout.TRAINED_FILES.at(home=prefix), *relative.parts[:-1]])
            files[relative.as_posix()] = put_data(store, key_prefix, relative.name, path)
    record = CheckpointRecord(folder=layout.TRAINED_FILES.at(home=prefix), files=files, **facts)
    write_record(store, key, record)
    return read_record(store, key, CheckpointRecord)


def store_curve(store: Store, prefix: str, curve: list[dict[str, float]]) -> DataObject:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.parquet"
        names = dict.fromkeys(name for row in curve for name in row)  # a figure may first appear in a later row
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in curve]), path)
        return put_data(store, layout.CURVES.at(home=prefix), "curve.parquet", path)


def publish_folder(store: Store, folder: Path) -> CheckpointRecord:
    """Put a local checkpoint folder into a store; the same folder gives the same record."""
    if not (folder / models.CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {models.CONFIG}", remedy="name the folder of a checkpoint")
    models.check_files(folder, *(path.name for path in folder.iterdir()))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): sha256_of(p) for p in files}
    name = digest(hashes)
    copy = partial(shutil.copytree, folder, dirs_exist_ok=True)
    facts: dict[str, Any] = {"run": name, "step": 0, "position": 0, "snapshot": "", "start_from": None, "parameters": 0}
    return publish(store, layout.IMPORTED.at(digest=name), copy, **facts)


def published(store: Store, prefix: str) -> CheckpointRecord | None:
    try:
        return read_record(store, layout.CHECKPOINT.at(home=prefix), CheckpointRecord)
    except NotFound:
        return None


def fetch(store: Store, record: CheckpointRecord, folder: Path) -> Path:
    """Fetch a checkpoint into a folder and check its hashes; the folder then has a SHA256SUMS file."""
    fetch_files(store, record.files, folder)
    if not (folder / models.SUMS).is_file():  # checkpoints of earlier versions had none
        models.write_sums(folder)
    return folder


def fetch_files(store: Store, files: dict[str, DataObject], folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"the checkpoint names a file outside of its folder ({name})", remedy="do not use it")
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_data(store, data, path)
    return folder


def load_part(path: Path, module: torch.nn.Module, what: str) -> None:
    """Load a safetensors file into a module; an error names what is missing, left over or of another shape."""
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what} cannot be read from {path} ({error})", remedy="fetch it again") from None
    problems = differences(shapes(module.state_dict()), shapes(weights))
    refuse(problems, f"{what} in {path} does not fit", "use the settings that it was trained with")
    module.load_state_dict(weights)

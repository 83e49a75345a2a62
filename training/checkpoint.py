"""Training states to resume from, and checkpoints to use: both are data objects first and one record last.

    <prefix>/state/<step>-<rank>-<sha256>.safetensors   each rank's ranges of the flat fp32 vectors
    <prefix>/states/<step>.json                          the state is whole (written by rank 0, after all ranks)
    <prefix>/checkpoint/<name>-<sha256>                  config.json, model.safetensors (EMA), text/, repa head
    <prefix>/checkpoint.json                             the run is done

Any number of ranks can resume from a state: ranges of flat vectors are cut anew.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra.config import digest
from infra.errors import CheckpointError, NotFound
from infra.files import sha256_of
from infra.records import CheckpointRecord, DataObject, Record, fetch_data, put_data, read_record, write_record
from infra.store import Store
from training import model as models
from training.ema import Ema
from training.engine import Engine
from training.model.fit import differences, refuse, shapes

KEPT_STATES = 2  # the newest, and the one before it for whoever has begun to read it


class StateFile(Record):
    data: DataObject
    ranges: dict[str, tuple[int, int]]  # tensor name -> its range of the flat vector


class TrainingState(Record):
    run: str
    step: int
    position: int  # samples consumed
    files: list[StateFile]
    curve: list[dict[str, float]]  # what was logged up to this step


def save_state(
    store: Store, prefix: str, engine: Engine, ema: Ema, *, run: str, step: int, position: int, curve: list[Any]
) -> None:
    """Every rank calls it; when it returns on rank 0 the state is committed."""
    tensors, ranges = engine.state(), {}
    for group, (shard, (start, end)) in enumerate(zip(ema.shards, engine.ranges(), strict=True)):
        tensors[f"ema.{group}"] = shard[: end - start]
    for name in tensors:
        ranges[name] = engine.ranges()[int(name.rpartition(".")[2])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        data = put_data(store, f"{prefix}/state", f"{step:08d}-{engine.rank:05d}.safetensors", path)
    files: list[Any] = [None] * engine.ranks
    dist.all_gather_object(files, StateFile(data=data, ranges=ranges))
    if engine.rank == 0:
        state = TrainingState(run=run, step=step, position=position, files=files, curve=curve)
        write_record(store, f"{prefix}/states/{step:08d}.json", state)
        _drop_old_states(store, prefix)
    dist.barrier()


def _drop_old_states(store: Store, prefix: str) -> None:
    """The record goes first: a state whose record is there must be whole."""
    for key in sorted(entry.key for entry in store.list(f"{prefix}/states/"))[:-KEPT_STATES]:
        state = read_record(store, key, TrainingState)
        store.delete(key)
        for file in state.files:
            store.delete(file.data.key)


def newest_state(store: Store, prefix: str) -> TrainingState | None:
    keys = sorted(entry.key for entry in store.list(f"{prefix}/states/"))
    return read_record(store, keys[-1], TrainingState) if keys else None


def load_state(store: Store, state: TrainingState, engine: Engine, ema: Ema) -> None:
    with tempfile.TemporaryDirectory() as folder:
        opened = []
        for number, file in enumerate(state.files):
            path = Path(folder) / f"{number}.safetensors"
            fetch_data(store, file.data, path)
            opened.append((file.ranges, safe_open(path, "pt")))

        def read(name: str, start: int, end: int) -> torch.Tensor:
            pieces = list(_overlaps(opened, name, start, end))
            if sum(len(piece) for piece in pieces) != end - start:
                raise CheckpointError(
                    f"the training state at step {state.step} does not fit this model ({name} is of another length)",
                    remedy="the model's settings have changed: start another run",
                )
            return torch.cat(pieces) if pieces else torch.zeros(0)

        engine.load_state(read, state.step)
        for group, (shard, (start, end)) in enumerate(zip(ema.shards, engine.ranges(), strict=True)):
            shard[: end - start] = read(f"ema.{group}", start, end).to(shard)


def _overlaps(opened: list[Any], name: str, start: int, end: int) -> Iterator[torch.Tensor]:
    for ranges, file in opened:
        low, high = ranges.get(name, (0, 0))
        first, last = max(start, low), min(end, high)
        if first < last:
            yield file.get_slice(name)[first - low : last - low]


def publish(store: Store, prefix: str, write: Callable[[Path], None], **facts: Any) -> CheckpointRecord:
    """`write(folder)` lays the checkpoint's files out; they are stored, then the record that names them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = path.relative_to(folder)
            where = "/".join([prefix, "checkpoint", *relative.parts[:-1]])
            files[relative.as_posix()] = put_data(store, where, relative.name, path)
    record = CheckpointRecord(folder=f"{prefix}/checkpoint", files=files, **facts)
    write_record(store, f"{prefix}/checkpoint.json", record)
    return read_record(store, f"{prefix}/checkpoint.json", CheckpointRecord)


def publish_folder(store: Store, folder: Path) -> CheckpointRecord:
    """A checkpoint folder of this machine as a record in a store; the same folder gives the same record."""
    if not (folder / models.CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {models.CONFIG}", remedy="name the folder of a checkpoint")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): sha256_of(p) for p in files}
    name = digest(hashes)
    copy = partial(shutil.copytree, folder, dirs_exist_ok=True)
    facts = {"run": name, "step": 0, "position": 0, "snapshot": "", "start_from": None, "parameters": 0}
    return publish(store, f"imported/{name}", copy, **facts)


def published(store: Store, prefix: str) -> CheckpointRecord | None:
    try:
        return read_record(store, f"{prefix}/checkpoint.json", CheckpointRecord)
    except NotFound:
        return None


def fetch(store: Store, record: CheckpointRecord, folder: Path) -> Path:
    """The checkpoint as an ordinary folder, its bytes held against their names."""
    return fetch_files(store, record.files, folder)


def fetch_files(store: Store, files: dict[str, DataObject], folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"the checkpoint names a file outside of its folder ({name})", remedy="do not use it")
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_data(store, data, path)
    return folder


def load_part(path: Path, module: torch.nn.Module, what: str) -> None:
    """Weights of one safetensors file into a module; what is missing, left over or misshapen is named."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what} cannot be read from {path} ({error})", remedy="fetch it again") from None
    problems = differences(shapes(module.state_dict()), shapes(found))
    refuse(problems, f"{what} in {path} does not fit", "use the settings that it was trained with")
    module.load_state_dict(found)

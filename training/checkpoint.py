"""Training states to resume from, and checkpoints to use. Of both, the data objects are written first, the record last.

    <prefix>/state/<step>-<rank>-<attempt>-<sha256>.safetensors   each rank's ranges of the flat fp32 vectors
    <prefix>/states/<step>-<attempt>.json     the record of a complete state (rank 0 writes it, after all ranks)
    <prefix>/checkpoint/<name>-<sha256>       config.json, model.safetensors (EMA), text/, repa head, SHA256SUMS
    <prefix>/checkpoint.json                  the record of the checkpoint: the run is done

Any number of ranks can resume from a state, as each reads the ranges of the flat vectors that it needs. An attempt is
one start of all ranks, and its name is in the keys of all that it writes. So two attempts at one run at the same time
never mix their parts, and neither deletes what only the other's records name. Each state is complete and of one step,
so either attempt may resume from the other's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra import layout
from infra.config import digest
from infra.errors import CheckpointError, DataError, NotFound, RecordError
from infra.files import sha256_of
from infra.records import CheckpointRecord, DataObject, Record, fetch_data, put_data, read_record, write_record
from infra.store import Store
from training import model as models
from training.ema import Ema
from training.engine import Engine
from training.model.fit import differences, refuse, shapes
from training.team import Team

KEPT_STEPS = 2  # the newest state, and the one before it in case the newest is damaged


class StateFile(Record):
    data: DataObject
    ranges: dict[str, tuple[int, int]]  # tensor name -> its range of the flat vector
    step: int | None = None  # at which its rank wrote it; absent in schema 1
    attempt: str = ""


class TrainingState(Record):
    newest_schema: ClassVar[int] = 2
    schema_version: int = 2
    run: str
    step: int
    position: int  # samples consumed
    files: list[StateFile]
    curve: list[dict[str, float]]  # the rows logged up to this step
    attempt: str = ""

    @model_validator(mode="after")
    def _is_of_one_step(self) -> TrainingState:
        if self.schema_version > 1 and any((f.step, f.attempt) != (self.step, self.attempt) for f in self.files):
            raise ValueError("its parts are of several steps or attempts")
        return self


def save_state(
    store: Store,
    prefix: str,
    team: Team,
    engine: Engine,
    ema: Ema,
    *,
    run: str,
    attempt: str,
    step: int,
    position: int,
    curve: list[Any],
    allowed: Callable[[], None],
) -> None:
    """Every rank calls it; when it returns, the state is committed.

    `allowed` is called before the commit and raises if another driver has taken the run over.
    """

    def put_part() -> StateFile:
        tensors, ranges = engine.state(), {}
        for group, (shard, (start, end)) in enumerate(zip(ema.shards, engine.ranges(), strict=True)):
            tensors[f"ema.{group}"] = shard[: end - start]
        for name in tensors:
            ranges[name] = engine.ranges()[int(name.rpartition(".")[2])]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            name = f"{step:08d}-{engine.rank:05d}-{attempt}.safetensors"
            data = put_data(store, layout.STATE_PARTS.at(home=prefix), name, path)
        return StateFile(data=data, ranges=ranges, step=step, attempt=attempt)

    def commit(files: list[StateFile]) -> None:
        allowed()
        state = TrainingState(run=run, attempt=attempt, step=step, position=position, files=files, curve=curve)
        written = write_record(store, layout.STATE.at(home=prefix, step=step, attempt=attempt), state)
        assert written, "an attempt commits each step once"
        drop_states(store, prefix, kept=KEPT_STEPS)

    files = team.on_each_rank(put_part)
    team.check_agreed((step, position, attempt), "the state to commit")
    team.on_rank_0(lambda: commit(files))


def drop_states(store: Store, prefix: str, *, kept: int) -> None:
    """Deletes the states of all but the newest `kept` steps; another driver may do the same at this moment.

    A state whose record exists must be complete, so the record is deleted first. Where a record cannot be read, its
    state is left to `data gc`.
    """
    keys = _state_keys(store, prefix)
    steps = sorted({step for step, _ in keys})
    dropped = steps[:-kept] if kept else steps
    for step, key in keys:
        if step not in dropped:
            continue
        try:
            state = read_record(store, key, TrainingState)
        except (NotFound, RecordError):
            continue
        store.delete(key)
        for file in state.files:
            store.delete(file.data.key)


def _state_keys(store: Store, prefix: str) -> list[tuple[int, str]]:
    """The step and the key of every state's record, ordered by step."""
    keys = [entry.key for entry in store.list(layout.STATE.under(home=prefix))]
    parsed = ((layout.STATE.parse(key) or layout.OLD_STATE.parse(key), key) for key in keys)
    return sorted((fields["step"], key) for fields, key in parsed if fields)


class NewestState(NamedTuple):
    key: str
    state: TrainingState | None  # None: its record cannot be read
    problem: str = ""


def newest_state(store: Store, prefix: str, left_out: Container[str] = ()) -> NewestState | None:
    """The state of the highest step whose key is not in `left_out`."""
    for _, key in reversed(_state_keys(store, prefix)):
        if key in left_out:
            continue
        try:
            return NewestState(key, read_record(store, key, TrainingState))
        except NotFound:
            continue  # deleted since the keys were listed
        except RecordError as error:
            return NewestState(key, None, error.message)
    return None


def resume(
    store: Store, prefix: str, team: Team, engine: Engine, ema: Ema, tell: Callable[[str], None]
) -> TrainingState | None:
    """The newest undamaged state, loaded on every rank; None if the run has not committed one.

    A damaged state is reported through `tell`, and the one before it is tried. If all are damaged, this raises: to
    start again may throw away weeks of work, which only the run's owner may decide.
    """
    damaged: dict[str, str] = {}
    while (newest := team.on_rank_0(lambda: newest_state(store, prefix, damaged))) is not None:
        key, state, problem = newest
        with tempfile.TemporaryDirectory() as folder:
            if state is not None:
                problems = team.on_each_rank(partial(_fetch_parts, store, state, engine, Path(folder)))
                problem = next(filter(None, problems), "")
            if state is not None and not problem:
                team.check_agreed((state.step, state.position, state.digest()), "where to go on from")
                _load(state, Path(folder), engine, ema)
                return state
        damaged[key] = problem
        tell(f"the training state {key} is not used: {problem}")
    team.on_rank_0(lambda: _refuse_to_begin_anew(store, prefix, damaged))
    return None


def _refuse_to_begin_anew(store: Store, prefix: str, damaged: dict[str, str]) -> None:
    """Raises if damaged states exist. Those deleted meanwhile were not damaged: a driver further ahead dropped them."""
    problems = [problem for key, problem in damaged.items() if store.exists(key)]
    if problems:
        raise CheckpointError(
            f"every training state of this run is damaged ({'; '.join(problems)})",
            remedy=f"to train from the beginning, delete {store.url}/{layout.STATE.under(home=prefix)} and run again",
        )


def _fetch_parts(store: Store, state: TrainingState, engine: Engine, folder: Path) -> str:
    """Fetch the files that overlap this rank's ranges and check their hashes; returns what is wrong with one, or ""."""
    for number, file in enumerate(state.files):
        overlaps = (
            max(start, low) < min(end, high)
            for group, (start, end) in enumerate(engine.ranges())
            for low, high in [file.ranges.get(f"master.{group}", (0, 0))]
        )
        if any(overlaps):
            try:
                fetch_data(store, file.data, folder / f"{number}.safetensors")
            except (NotFound, DataError) as error:
                return error.message
    return ""


def _load(state: TrainingState, folder: Path, engine: Engine, ema: Ema) -> None:
    """Load this rank's ranges from the fetched files into the engine and the EMA."""
    paths = {number: folder / f"{number}.safetensors" for number in range(len(state.files))}
    opened = [(state.files[number].ranges, safe_open(path, "pt")) for number, path in paths.items() if path.exists()]

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
    """Store the files that `write(folder)` makes, then the record that names them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = path.relative_to(folder)
            key_prefix = "/".join([layout.TRAINED_FILES.at(home=prefix), *relative.parts[:-1]])
            files[relative.as_posix()] = put_data(store, key_prefix, relative.name, path)
    record = CheckpointRecord(folder=layout.TRAINED_FILES.at(home=prefix), files=files, **facts)
    write_record(store, layout.CHECKPOINT.at(home=prefix), record)
    return read_record(store, layout.CHECKPOINT.at(home=prefix), CheckpointRecord)


def publish_folder(store: Store, folder: Path) -> CheckpointRecord:
    """Put a local checkpoint folder into a store; the same folder gives the same record."""
    if not (folder / models.CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {models.CONFIG}", remedy="name the folder of a checkpoint")
    models.check_files(folder, *(path.name for path in folder.iterdir()))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): sha256_of(p) for p in files}
    name = digest(hashes)
    copy = partial(shutil.copytree, folder, dirs_exist_ok=True)
    facts = {"run": name, "step": 0, "position": 0, "snapshot": "", "start_from": None, "parameters": 0}
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

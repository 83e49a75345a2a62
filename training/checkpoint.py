"""Training states to resume from, and checkpoints to use: both are data objects first and one record last.

    <prefix>/state/<step>-<rank>-<attempt>-<sha256>.safetensors   each rank's ranges of the flat fp32 vectors
    <prefix>/states/<step>-<attempt>.json     the state is whole (written by rank 0, after all ranks)
    <prefix>/checkpoint/<name>-<sha256>       config.json, model.safetensors (EMA), text/, repa head, SHA256SUMS
    <prefix>/checkpoint.json                  the run is done

Any number of ranks can resume from a state: ranges of flat vectors are cut anew. An attempt is one start of all ranks;
whatever it writes carries its name, so two that work on one run at the same time never mix their parts, and neither
deletes what only the other one's records name. Each of their states is whole and of one step, so either may go on from
the other's.
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
    step: int | None = None  # of the rank that wrote it; schema 1 did not tell
    attempt: str = ""


class TrainingState(Record):
    newest_schema: ClassVar[int] = 2
    schema_version: int = 2
    run: str
    step: int
    position: int  # samples consumed
    files: list[StateFile]
    curve: list[dict[str, float]]  # what was logged up to this step
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
    """Every rank calls it; when it returns the state is committed. `allowed` raises if this run is another's by now."""

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

    files = team.each(put_part)
    team.check_agreed((step, position, attempt), "the state to commit")
    team.decided(lambda: commit(files))


def drop_states(store: Store, prefix: str, *, kept: int) -> None:
    """Deletes the states of all but the newest `kept` steps; somebody else may do the same at this moment.

    The record goes first: a state whose record is there must be whole. One that cannot be read is left to `data gc`.
    """
    keys = _state_keys(store, prefix)
    steps = sorted({step for step, _ in keys})
    stay = steps[-kept:] if kept else []
    for step, key in keys:
        if step in stay:
            continue
        try:
            state = read_record(store, key, TrainingState)
        except (NotFound, RecordError):
            continue
        store.delete(key)
        for file in state.files:
            store.delete(file.data.key)


def _state_keys(store: Store, prefix: str) -> list[tuple[int, str]]:
    """The step and the key of every state's record, in the order of their steps."""
    listed = [entry.key for entry in store.list(layout.STATE.under(home=prefix))]
    found = ((layout.STATE.parse(key) or layout.OLD_STATE.parse(key), key) for key in listed)
    return sorted((parts["step"], key) for parts, key in found if parts)


class Found(NamedTuple):
    key: str
    state: TrainingState | None
    problem: str = ""


def newest_state(store: Store, prefix: str, left_out: Container[str] = ()) -> Found | None:
    """The state of the highest step. One whose record cannot be read has no `state`, and says why."""
    for _, key in reversed(_state_keys(store, prefix)):
        if key in left_out:
            continue
        try:
            return Found(key, read_record(store, key, TrainingState))
        except NotFound:
            continue  # dropped since it was listed
        except RecordError as error:
            return Found(key, None, error.message)
    return None


def resume(
    store: Store, prefix: str, team: Team, engine: Engine, ema: Ema, tell: Callable[[str], None]
) -> TrainingState | None:
    """The newest whole state, loaded on every rank; None where the run has not committed one.

    A damaged state is told of and the one before it is taken. Where all are damaged the run does not begin anew by
    itself: that may be weeks of work, and is for its owner to say.
    """
    damaged: dict[str, str] = {}
    while (found := team.decided(lambda: newest_state(store, prefix, damaged))) is not None:
        key, state, problem = found
        with tempfile.TemporaryDirectory() as folder:
            if state is not None:
                problem = next(filter(None, team.each(partial(_fetch_parts, store, state, engine, Path(folder)))), "")
            if state is not None and not problem:
                team.check_agreed((state.step, state.position, state.digest()), "where to go on from")
                _load(state, Path(folder), engine, ema)
                return state
        damaged[key] = problem
        tell(f"the training state {key} is not used: {problem}")
    team.decided(lambda: _refuse_to_begin_anew(store, prefix, damaged))
    return None


def _refuse_to_begin_anew(store: Store, prefix: str, damaged: dict[str, str]) -> None:
    """What has vanished was no damage: another driver has come further, dropped it, and left what is newer."""
    left = [problem for key, problem in damaged.items() if store.exists(key)]
    if left:
        raise CheckpointError(
            f"every training state of this run is damaged ({'; '.join(left)})",
            remedy=f"to train from the beginning, delete {store.url}/{layout.STATE.under(home=prefix)} and run again",
        )


def _fetch_parts(store: Store, state: TrainingState, engine: Engine, folder: Path) -> str:
    """The files of which this rank needs a range, held against their hashes; what is wrong with one, if anything."""
    own = engine.ranges()
    for number, file in enumerate(state.files):
        spans = (file.ranges.get(f"master.{group}", (0, 0)) for group in range(len(own)))
        if any(max(span[0], mine[0]) < min(span[1], mine[1]) for span, mine in zip(spans, own, strict=True)):
            try:
                fetch_data(store, file.data, folder / f"{number}.safetensors")
            except (NotFound, DataError) as error:
                return error.message
    return ""


def _load(state: TrainingState, folder: Path, engine: Engine, ema: Ema) -> None:
    """The fetched files' ranges into the engine and the EMA."""
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
    """`write(folder)` lays the checkpoint's files out; they are stored, then the record that names them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            relative = path.relative_to(folder)
            where = "/".join([layout.TRAINED_FILES.at(home=prefix), *relative.parts[:-1]])
            files[relative.as_posix()] = put_data(store, where, relative.name, path)
    record = CheckpointRecord(folder=layout.TRAINED_FILES.at(home=prefix), files=files, **facts)
    write_record(store, layout.CHECKPOINT.at(home=prefix), record)
    return read_record(store, layout.CHECKPOINT.at(home=prefix), CheckpointRecord)


def publish_folder(store: Store, folder: Path) -> CheckpointRecord:
    """A checkpoint folder of this machine as a record in a store; the same folder gives the same record."""
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
    """The checkpoint as an ordinary folder, its bytes held against their names; it carries its hashes."""
    fetch_files(store, record.files, folder)
    if not (folder / models.SUMS).is_file():  # published before checkpoints carried them
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
    """Weights of one safetensors file into a module; what is missing, left over or misshapen is named."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what} cannot be read from {path} ({error})", remedy="fetch it again") from None
    problems = differences(shapes(module.state_dict()), shapes(found))
    refuse(problems, f"{what} in {path} does not fit", "use the settings that it was trained with")
    module.load_state_dict(found)

"""Training states, which runs resume from: each rank's part is a data object, and the record is written last.

    <prefix>/state/<step>-<rank>-<attempt>-<sha256>.safetensors   a rank's fragments of masters, moments and averages
    <prefix>/states/<step>-<attempt>.json                         the record of a complete state, written by rank 0

A part holds ranges of parameters by name, so any number of ranks, at any stage of ZeRO, can resume from a state: each
reads the ranges that it needs. An attempt is one start of all ranks, and its name is in the keys of all that it writes.
So two attempts at one run at the same time never mix their parts, and neither deletes what only the other's records
name. Each state is complete and of one step, so either attempt may resume from the other's.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import model_validator
from safetensors import safe_open
from torch import Tensor

from infra import layout
from infra.errors import CheckpointError, NotFound, RecordError
from infra.records import DataObject, Record, fetch_data, put_data, read_record, write_record
from infra.store import Store
from training.ema import Ema
from training.engine import Engine
from training.part_files import HostCopies, fetch_once, write_tensors
from training.part_files import part as part_path
from training.team import Ranges, Team
from training.zero import Fragment

Allowed = Callable[[], None]  # raises if the run is another driver's by now


class StateFile(Record):
    data: DataObject
    ranges: dict[str, tuple[int, int]]  # parameter -> its range; up to schema 2: kind and group -> of its flat vector
    step: int | None = None  # at which its rank wrote it; absent in schema 1
    attempt: str = ""


class Return(Record):
    """A run whose weights broke went back to an earlier state, and on behind the batches that had broken them."""

    at: int  # the step at which it was noticed
    to: int  # the step of the state that it went back to
    past: int  # the position from which it went on


class TrainingState(Record):
    newest_schema: ClassVar[int] = 3
    schema_version: int = 3
    run: str
    step: int
    position: int  # samples consumed
    files: list[StateFile]
    curve: list[dict[str, float]]  # the rows logged up to this step
    attempt: str = ""
    kept: bool = False  # for good, whatever comes after it
    returns: tuple[Return, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_step(self) -> TrainingState:
        if self.schema_version > 1 and any((f.step, f.attempt) != (self.step, self.attempt) for f in self.files):
            raise ValueError("its parts are of several steps or attempts")
        return self


class Part(NamedTuple):
    """A rank's share of a state."""

    tensors: dict[str, Tensor]  # `kind/parameter`, flat
    ranges: dict[str, tuple[int, int]]  # parameter -> its range


def collected(engine: Engine, ema: Ema) -> Part:
    averages = {
        f"{kind}/{f.name}": f.of(shards[f.flat]) for kind, shards in ema.shards.items() for f in engine.fragments
    }
    return Part(engine.state() | averages, {f.name: (f.start, f.end) for f in engine.fragments})


class Saver:
    """Commits states while training goes on: one at a time, each copied to host memory first.

    All ranks begin the same states in the same order. What goes wrong is raised at the next call.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        *,
        run: str,
        attempt: str,
        keep: int,
        keep_every: int,
        allowed: Allowed,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """`allowed` raises on rank 0 where this run may not commit, `settle` on a rank whose samples were damaged."""
        self.team = Team.apart()
        self._store, self._prefix, self._run, self._attempt = store, prefix, run, attempt
        self._keep, self._keep_every, self._allowed, self._settle = keep, keep_every, allowed, settle
        self._copies = HostCopies()
        self._under_way: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self, part: Part, facts: dict[str, Any], first: Callable[[Team, Part], None], then: Callable[[], None]
    ) -> None:
        """`facts` are the record's; `first` is called before the state is written, `then` once it is committed."""
        self.wait()
        part = Part(self._copies.take(part.tensors), part.ranges)
        facts = facts | {"kept": self._keep_every > 0 and facts["step"] % self._keep_every == 0}

        def work() -> None:
            try:
                first(self.team, part)
                self._save(part, facts)
                then()
            except BaseException as error:  # noqa: BLE001 - it is raised where the training is
                self._error = error

        # A daemon: where another rank has died it would wait for its answer, and keep this process from ending.
        self._under_way = threading.Thread(target=work, name="state", daemon=True)
        self._under_way.start()

    def check(self) -> None:
        """Raises what went wrong with a state that is no longer under way."""
        if self._under_way is not None and not self._under_way.is_alive():
            self.wait()

    def wait(self) -> None:
        if self._under_way is not None:
            self._under_way.join()
            self._under_way = None
        if self._error is not None:
            raise self._error

    def _save(self, part: Part, facts: dict[str, Any]) -> None:
        store, prefix, step, attempt = self._store, self._prefix, facts["step"], self._attempt

        def put_part() -> StateFile:
            self._settle()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state.safetensors"
                sha256 = write_tensors(path, part.tensors)
                name = f"{step:08d}-{self.team.rank:05d}-{attempt}.safetensors"
                data = put_data(store, layout.STATE_PARTS.at(home=prefix), name, path, sha256)
            return StateFile(data=data, ranges=part.ranges, step=step, attempt=attempt)

        def commit(files: list[StateFile]) -> None:
            self._allowed()
            state = TrainingState(run=self._run, attempt=attempt, files=files, **facts)
            written = write_record(store, layout.STATE.at(home=prefix, step=step, attempt=attempt), state)
            assert written, "an attempt commits each step once"
            drop(store, prefix, keep=self._keep)

        files = self.team.on_each_rank(put_part)
        self.team.check_agreed((step, facts["position"], attempt), "the state to commit")
        self.team.on_rank_0(lambda: commit(files))


def drop(store: Store, prefix: str, *, keep: int) -> None:
    """Deletes the states of all but the newest `keep` steps; another driver may do the same at this moment.

    A state whose record exists must be complete, so the record is deleted first. Where a record cannot be read, its
    state is left to `data gc`.
    """
    keys = _keys(store, prefix)
    steps = sorted({step for step, _ in keys})
    newest = steps[-keep:] if keep else []
    for step, key in keys:
        if step in newest:
            continue
        try:
            state = read_record(store, key, TrainingState)
        except (NotFound, RecordError):
            continue
        if not state.kept:
            store.delete(key)
            for file in state.files:
                store.delete(file.data.key)


def _keys(store: Store, prefix: str) -> list[tuple[int, str]]:
    """The step and the key of every state's record, ordered by step."""
    keys = [entry.key for entry in store.list(layout.STATE.under(home=prefix))]
    parsed = ((layout.STATE.parse(key) or layout.OLD_STATE.parse(key), key) for key in keys)
    return sorted((fields["step"], key) for fields, key in parsed if fields)


class Newest(NamedTuple):
    key: str
    state: TrainingState | None  # None: its record cannot be read
    problem: str = ""


def newest(store: Store, prefix: str, left_out: Container[str] = ()) -> Newest | None:
    """The state of the highest step whose key is not in `left_out`."""
    for _, key in reversed(_keys(store, prefix)):
        if key in left_out:
            continue
        try:
            return Newest(key, read_record(store, key, TrainingState))
        except NotFound:
            continue  # deleted since the keys were listed
        except RecordError as error:
            return Newest(key, None, error.message)
    return None


def resume(
    store: Store, prefix: str, team: Team, engine: Engine, ema: Ema, tell: Callable[[str], None]
) -> TrainingState | None:
    """The newest undamaged state, loaded on every rank; None if the run has not committed one.

    A damaged state is reported through `tell`, and the one before it is tried. If all are damaged, this raises: to
    start again may throw away weeks of work, which only the run's owner may decide.
    """
    damaged: dict[str, str] = {}
    while (candidate := team.on_rank_0(lambda: newest(store, prefix, damaged))) is not None:
        key, state, problem = candidate
        if state is not None:
            with tempfile.TemporaryDirectory() as own:
                wanted = _wanted(state, engine)
                folder, problem = fetch_once(team, wanted, Path(own), partial(_fetch, store, state))
                if not problem:
                    team.check_agreed((state.step, state.position, state.digest()), "where to go on from")
                    team.on_each_rank(partial(_load, state, folder, engine, ema))  # all, before the folder goes
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


def _wanted(state: TrainingState, engine: Engine) -> list[int]:
    """The numbers of the files that overlap this rank's ranges."""
    places = _places(state, engine)
    return [
        number
        for number, file in enumerate(state.files)
        if any(_overlap(file.ranges, *places("master", fragment)) for fragment in engine.fragments)
    ]


def _fetch(store: Store, state: TrainingState, number: int, path: Path) -> None:
    fetch_data(store, state.files[number].data, path)  # which checks its hash


def _load(state: TrainingState, folder: Path, engine: Engine, ema: Ema) -> None:
    """Load this rank's ranges from the fetched files into the engine and the EMA."""
    places = _places(state, engine)
    with ExitStack() as stack:
        paths = [(file.ranges, part_path(folder, number)) for number, file in enumerate(state.files)]
        files = [(ranges, stack.enter_context(safe_open(path, "pt"))) for ranges, path in paths if path.exists()]

        def read(kind: str, fragment: Fragment) -> Tensor:
            tensor, name, start, end = places(kind, fragment)
            pieces = list(_pieces(files, tensor, name, start, end))
            if sum(map(len, pieces)) != end - start:
                raise CheckpointError(
                    f"the training state at step {state.step} does not fit this model ({fragment.name} has another"
                    " length)",
                    remedy="the model's settings have changed: start another run",
                )
            return torch.cat(pieces)

        engine.load_state(read, state.step)
        for kind, shards in ema.shards.items():
            for fragment in engine.fragments:
                fragment.of(shards[fragment.flat]).copy_(read(kind, fragment))


def _pieces(files: Sequence[tuple[Ranges, Any]], tensor: str, name: str, start: int, end: int) -> Iterator[Tensor]:
    for ranges, file in files:
        if overlap := _overlap(ranges, tensor, name, start, end):
            first, last = overlap
            low = ranges[name][0]
            yield file.get_slice(tensor)[first - low : last - low]


def _overlap(ranges: Ranges, tensor: str, name: str, start: int, end: int) -> tuple[int, int] | None:
    low, high = ranges.get(name, (0, 0))
    first, last = max(start, low), min(end, high)
    return (first, last) if first < last else None


Place = tuple[str, str, int, int]  # the name of a tensor in a part, the name of its range, and a range


def _places(state: TrainingState, engine: Engine) -> Callable[[str, Fragment], Place]:
    """Where the parts of a state have a fragment of a kind."""
    if state.schema_version > 2:
        return lambda kind, f: (f"{kind}/{f.name}", f.name, f.start, f.end)
    # Up to schema 2 a part held ranges of each group's vector, in which ZeRO 1 and 2 lay all parameters end to end.
    begins = engine.begins()

    def place(kind: str, fragment: Fragment) -> Place:
        group, begin = begins[fragment.name]
        return f"{kind}.{group}", f"{kind}.{group}", begin + fragment.start, begin + fragment.end

    return place

"""What is left to download, and which shards wait for it.

A shard waits for the batches that its rows are linked to, as far as they are not there: they may be asked for by its
own list or by another one, or have been there and been dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.prepare import links, originals
from data_prep.prepare.linked import Linked
from data_prep.prepare.linking import Asking, link
from data_prep.prepare.links import Batch, Links, LinksRecord, Slice
from data_prep.prepare.originals import State
from data_prep.prepare.plan import KnownAs, Plan, PlannedShard, PrepareSettings
from data_prep.sources import Rows, UrlSource
from data_prep.web.fetch import FetchSettings
from infra.errors import DataError
from infra.records import read_record
from infra.store import Store


class Work(NamedTuple):
    """A batch, to be downloaded."""

    batch: Batch
    state: State  # how far it is
    max_bytes: int
    links: LinksRecord | None  # of the list that asks for it; None where it was there before
    needed_by: str  # for people: a source and its input

    def __str__(self) -> str:
        return f"the downloads {self.batch.number} ({self.needed_by})"


class Downloads:
    """Of a job: `works` are all that is missing for these shards, in the order of their rows."""

    def __init__(self, store: Store, settings: PrepareSettings, plan: Plan, shards: Sequence[PlannedShard]) -> None:
        self._store, self._settings = store, settings
        self._at = _lists(settings, plan, shards)
        self._links = link(store, settings.fetch, list(self._at.values()))
        self._states = originals.states(store)
        self._attempts = {name: state.attempt for name, state in self._states.items() if state.attempt > 0}
        self._asked = dict(self._all_asked())
        self._had: dict[str, npt.NDArray[np.bool_]] = {}  # of dropped batches: where there were bytes
        self._numbers: dict[str, int] = {}  # of batches among the works
        self.works: list[Work] = []
        self._shards = list(shards)
        needs = list(self._all_needs())
        self._waiting = [len(found) for found in needs]  # of each shard, for how many works
        self.ready = [shard for shard, waiting in zip(self._shards, self._waiting, strict=True) if not waiting]
        flat = np.concatenate([np.zeros(0, np.int32), *needs])
        order = np.argsort(flat, kind="stable")
        self._needed_by = np.repeat(np.arange(len(needs)), self._waiting)[order]  # shards, work by work
        self._ends = np.searchsorted(flat[order], np.arange(len(self.works)), "right").tolist()

    def finished(self, work: Work) -> Iterator[PlannedShard]:
        """The shards that waited for this and wait for nothing more."""
        number = self._numbers[work.batch.name]
        if work.state.dropped:
            self._attempts[work.batch.name] = work.state.attempt + 1
        for place in self._needed_by[self._ends[number - 1] if number else 0 : self._ends[number]].tolist():
            self._waiting[place] -= 1
            if not self._waiting[place]:
                yield self._shards[place]

    def linked(self, shard: PlannedShard) -> Linked | None:
        """What the task that makes the shard is told of its originals; None where its source is no list of URLs."""
        if shard.known_as not in self._at:
            return None
        record = self._links[self._at[shard.known_as].at]
        if not self._attempts:
            return Linked(record, {})
        with links.opened(self._store, record) as file:
            names = _slice(file, shard).names
        return Linked(record, {name: self._attempts[name] for name in names if name in self._attempts})

    def _all_asked(self) -> Iterator[tuple[str, tuple[Batch, LinksRecord]]]:
        """The batches that these lists ask for, and that others ask for to which they are linked."""
        found = {record.at.key: record for record in self._links.values()}
        for key in {key for record in found.values() for key in record.others} - found.keys():
            found[key] = read_record(self._store, key, LinksRecord)
        for record in found.values():
            for batch in links.asked(self._store, record):
                yield batch.name, (batch, record)

    def _all_needs(self) -> Iterator[npt.NDArray[np.int32]]:
        for known_as, shards in groupby(self._shards, lambda shard: shard.known_as):
            with ExitStack() as files:
                file = None
                if known_as in self._at:
                    file = files.enter_context(links.opened(self._store, self._links[self._at[known_as].at]))
                for shard in shards:
                    yield np.array([] if file is None else list(self._needs(file, shard)), np.int32)

    def _needs(self, file: Links, shard: PlannedShard) -> Iterator[int]:
        """The works that a shard waits for."""
        here = _slice(file, shard)
        for code, name in enumerate(here.names):
            state = self._states.get(name, originals.NOTHING)
            if state.is_done or (state.dropped and not self._bytes_in(name, state)[here.at[here.codes == code]].any()):
                continue
            if name not in self._numbers:
                self._numbers[name] = len(self.works)
                self.works.append(self._work(shard, name, state))
            yield self._numbers[name]

    def _bytes_in(self, name: str, state: State) -> npt.NDArray[np.bool_]:
        if name not in self._had:
            record = originals.read_batch(self._store, name, state.attempt)
            causes = originals.read_index(self._store, record, ["cause"])["cause"]
            self._had[name] = causes.is_null().to_numpy()
        return self._had[name]

    def _work(self, shard: PlannedShard, name: str, state: State) -> Work:
        asking = self._at[shard.known_as]
        needed_by = f"{shard.source}, {shard.part.input}"
        if state.dropped:
            batch = Batch(name, len(self.works), int(self._bytes_in(name, state).sum()))
            return Work(batch, state, asking.source.max_bytes, None, needed_by)
        if name in self._asked:
            batch, record = self._asked[name]
            return Work(batch, state, record.asked_with["max_bytes"], record, needed_by)
        raise DataError(
            f"the downloads {self._store.url}/{originals.batch_key(name, 0)} are gone ({needed_by})",
            remedy=f"delete {self._store.url}/{asking.at.key} too, and run again: the URLs are looked up once more",
        )


def _lists(settings: PrepareSettings, plan: Plan, shards: Sequence[PlannedShard]) -> dict[KnownAs, Asking]:
    """The lists of URLs that these shards are made of."""
    sources, wanted = settings.by_name, {shard.known_as for shard in shards}
    found: dict[KnownAs, Asking] = {}
    for shard in plan.shards:
        source = sources[shard.source]
        if shard.known_as in wanted and isinstance(source, UrlSource):
            part = _rows(shard)
            whole = part._replace(first=0, rows=part.first + part.rows)
            found[shard.known_as] = Asking(source, settings.at(shard.known_as), whole)
    return found


def _rows(shard: PlannedShard) -> Rows:
    """The rows of the list of URLs that a shard is made of."""
    assert isinstance(shard.part, Rows)
    return shard.part


def _slice(file: Links, shard: PlannedShard) -> Slice:
    """What those rows are linked to."""
    part = _rows(shard)
    return file.slice(part.first, part.rows)


def download(store: Store, settings: FetchSettings, work: Work, *, keep: bool) -> None:
    """What a worker does."""
    if work.links is None:
        missing = originals.missing_again(store, work.batch.name, work.state)
    else:
        missing = links.missing(store, work.links, work.batch)
    originals.make(store, missing, settings, work.max_bytes, keep=keep)


def drop(store: Store, settings: PrepareSettings, plan: Plan) -> None:
    """Delete the tars that the plan's lists ask for; of others that they are linked to, what nobody is to keep."""
    own, used = set[str](), set[str]()
    for at in {settings.at(given) for given in plan.inputs if isinstance(settings.by_name[given.source], UrlSource)}:
        if (record := links.read_links(store, at)) is not None:
            own.update(batch.name for batch in links.asked(store, record))
            used.update(_names(store, record))
    states = {name: state for name, state in originals.states(store).items() if name in own | used}
    found = originals.records(store, states)
    originals.drop(store, (record for record in found if record.batch in own or not record.kept))


def _names(store: Store, record: LinksRecord) -> Iterator[str]:
    with links.opened(store, record) as file:
        for first in range(0, record.rows, links.GROUP):
            yield from file.slice(first, min(links.GROUP, record.rows - first)).names

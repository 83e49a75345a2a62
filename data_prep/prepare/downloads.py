"""Which batches of URLs are left to download, and which shards wait for them.

A shard waits for those batches that its rows are linked to and that are not in the store. Such a batch may be asked for
by the shard's own list or by another one, or it was downloaded earlier and then dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """A batch to be downloaded."""

    batch: Batch
    state: State
    max_bytes: int
    links: LinksRecord | None  # of the list that asks for it; None where the batch was downloaded before
    needed_by: str  # the source and the input, for messages

    def __str__(self) -> str:
        return f"the downloads {self.batch.number} ({self.needed_by})"


class Downloads:
    """The downloads of a job: `works` are the batches that its shards lack, in the order of the shards' rows."""

    def __init__(self, store: Store, settings: PrepareSettings, plan: Plan, shards: Sequence[PlannedShard]) -> None:
        self._store, self._settings = store, settings
        self._at = _lists(settings, plan, shards)
        self._links = link(store, settings.fetch, list(self._at.values()))
        self._states = originals.states(store)
        self._attempts = {name: state.attempt for name, state in self._states.items() if state.attempt > 0}
        self._asked = dict(self._all_asked())
        self._had: dict[str, npt.NDArray[np.bool_]] = {}  # of a dropped batch: which of its URLs gave bytes
        self._numbers: dict[str, int] = {}  # the place among `works` of a batch
        self.works: list[Work] = []
        self._shards = list(shards)
        needs = list(self._all_needs())
        self._waiting = list(map(len, needs))  # for how many works each shard waits
        self.ready = [shard for shard, waiting in zip(self._shards, self._waiting, strict=True) if not waiting]
        flat = np.concatenate([np.zeros(0, np.int32), *needs])
        order = np.argsort(flat, kind="stable")
        self._needed_by = np.repeat(np.arange(len(needs)), self._waiting)[order]  # shards, work by work
        self._ends = np.searchsorted(flat[order], np.arange(len(self.works)), "right").tolist()

    def finished(self, work: Work) -> Iterator[PlannedShard]:
        """The shards for which this was the last download that they waited for."""
        number = self._numbers[work.batch.name]
        if work.state.dropped:
            self._attempts[work.batch.name] = work.state.attempt + 1
        for place in self._needed_by[self._ends[number - 1] if number else 0 : self._ends[number]].tolist():
            self._waiting[place] -= 1
            if not self._waiting[place]:
                yield self._shards[place]

    def linked(self, shard: PlannedShard) -> Linked | None:
        """Where the task that makes the shard finds its originals; None where its source is no list of URLs."""
        if shard.known_as not in self._at:
            return None
        record = self._links[self._at[shard.known_as].at]
        if not self._attempts:
            return Linked(record, {})
        with links.opened(self._store, record) as file:
            names = _slice(file, shard).names
        return Linked(record, {name: self._attempts[name] for name in names if name in self._attempts})

    def _all_asked(self) -> Iterator[tuple[str, tuple[Batch, LinksRecord]]]:
        """The batches that these lists ask for, and those of the other lists that they are linked to."""
        records = {record.at.key: record for record in self._links.values()}
        for key in {key for record in records.values() for key in record.others} - records.keys():
            records[key] = read_record(self._store, key, LinksRecord)
        for record in records.values():
            for batch in links.asked(self._store, record):
                yield batch.name, (batch, record)

    def _all_needs(self) -> Iterator[npt.NDArray[np.int32]]:
        """For each shard the numbers of the works that it waits for."""
        for known_as, shards in groupby(self._shards, lambda shard: shard.known_as):
            if known_as not in self._at:
                yield from (np.zeros(0, np.int32) for _ in shards)
                continue
            with links.opened(self._store, self._links[self._at[known_as].at]) as file:
                for shard in shards:
                    yield np.array(list(self._needs(file, shard)), np.int32)

    def _needs(self, file: Links, shard: PlannedShard) -> Iterator[int]:
        rows = _slice(file, shard)
        for code, name in enumerate(rows.names):
            state = self._states.get(name, originals.NOTHING)
            if state.is_done or (state.dropped and not self._bytes_in(name, state)[rows.at[rows.codes == code]].any()):
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
    lists: dict[KnownAs, Asking] = {}
    for shard in plan.shards:
        source = sources[shard.source]
        if shard.known_as in wanted and isinstance(source, UrlSource):
            part = _rows(shard)
            whole = part._replace(first=0, rows=part.first + part.rows)
            lists[shard.known_as] = Asking(source, settings.at(shard.known_as), whole)
    return lists


def _rows(shard: PlannedShard) -> Rows:
    """The rows of the list of URLs that a shard is made of."""
    assert isinstance(shard.part, Rows)
    return shard.part


def _slice(file: Links, shard: PlannedShard) -> Slice:
    """The links of these rows."""
    part = _rows(shard)
    return file.slice(part.first, part.rows)


def download(store: Store, settings: FetchSettings, work: Work, *, keep: bool) -> None:
    """Download a batch: the work of a Ray task."""
    if work.links is None:
        missing = originals.missing_again(store, work.batch.name, work.state)
    else:
        missing = links.missing(store, work.links, work.batch)
    originals.make(store, missing, settings, work.max_bytes, keep=keep)


def drop(store: Store, settings: PrepareSettings, plan: Plan) -> None:
    """Delete the tars of the batches that the plan's lists ask for.

    Of the other batches that they are linked to, those go whose own lists do not keep originals either.
    """
    own, used = set[str](), set[str]()
    for at in {settings.at(known) for known in plan.inputs if isinstance(settings.by_name[known.source], UrlSource)}:
        if (record := links.read_links(store, at)) is not None:
            own.update(batch.name for batch in links.asked(store, record))
            used.update(name for _, rows in links.slices(store, record) for name in rows.names)
    states = {name: state for name, state in originals.states(store).items() if name in own | used}
    records = originals.records(store, states)
    originals.drop(store, (record for record in records if record.batch in own or not record.kept))

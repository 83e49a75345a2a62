"""The tables of scores and captions beside a plan's shards, compared with their records and with the shards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from data_prep.prepare.plan import Plan
from data_prep.scores.job import Place
from data_prep.sources.reading import in_order
from data_prep.upkeep.verify.report import Report, examine
from data_prep.upkeep.verify.shards import Shards
from infra import layout
from infra.errors import RecordError
from infra.records import ScoreRecord, ScoreSummary, read_record
from infra.shards import read_index, read_parquet
from infra.store import Store


class ScoreTables(Report):
    """The tables of every scorer for a plan at one size."""

    def __init__(self, store: Store, plan: Plan, size: str, shards: Shards) -> None:
        super().__init__(store)
        self.tables = 0
        self.again: list[str] = []  # keys of records of tables, and of summaries, that must be made again
        self._plan, self._size, self._shards = plan, size, shards
        self._records: dict[str, ScoreRecord] = {}

    def read(self) -> None:
        stored: dict[str, set[int]] = defaultdict(set)  # scorer -> numbers of shards
        keys = []
        for key in layout.SCORE.keys(self.store, plan=self._plan.digest, size=self._size):
            place, number = _placed(key)
            stored[place.scorer].add(number)
            keys.append(key)
        self.tables = len(keys)
        for key, findings in zip(keys, in_order(lambda key: examine(partial(self._problems, key)), keys), strict=True):
            if self.note(self._name(key), findings):
                self.again.append(key)
        self._check_summaries(stored)

    def objects(self) -> list[str]:
        return self.damaged({key: self._name(record) for record in self.again for key in self._candidates(record)})

    def _candidates(self, key: str) -> Iterator[str]:
        """The table that a record names; if the record cannot be read, all objects that may be its table."""
        if record := self._records.get(key):
            yield record.table.key
        elif layout.SCORE.parse(key):
            place, number = _placed(key)
            yield from (entry.key for entry in self.store.list(_data_name(place, number)))

    def _problems(self, key: str) -> Iterator[str]:
        record = read_record(self.store, key, ScoreRecord)
        place, number = _placed(key)
        own = (record.plan, record.size, record.scorer, record.number) == (*place, number)
        if not own or record.table.key != f"{_data_name(place, number)}{record.table.sha256}.parquet":
            raise RecordError("its record speaks of another table", remedy="score again")
        self._records[key] = record
        table = read_parquet(self.store, record.table, None)
        if table.num_rows != record.rows or _failures(table) != record.failures:
            yield "its table and its record count differently"
        shard = self._shards.whole(number)
        if shard is not None:  # else the table is made again after its shard
            index = read_index(self.store, shard, ["key", "accepted"])
            if not table["key"].equals(index["key"].filter(index["accepted"])):
                yield "it is not of the samples that the shard holds"

    def _check_summaries(self, stored: dict[str, set[int]]) -> None:
        numbers = sorted(self._plan.all_numbers(self._size))
        for key in list(layout.SCORED.keys(self.store, plan=self._plan.digest, size=self._size)):
            scorer = _scorer(key)
            place = Place(self._plan.digest, self._size, scorer)
            known = numbers if key == place.summary_key(numbers) else []
            missing = sorted(set(known) - stored[scorer])
            if missing:
                self.problems.append(f"{self._name(key)}: {len(missing)} shards have none, the first {missing[0]}")
                self.again += [place.key(number) for number in missing]
            keys = [place.key(number) for number in known]
            if self.note(self._name(key), examine(partial(self._summary_problems, key, keys))):
                self.again.append(key)

    def _summary_problems(self, key: str, keys: list[str]) -> Iterator[str]:
        summary = read_record(self.store, key, ScoreSummary)
        records = [self._records[key] for key in keys if key in self._records]
        if keys and len(records) == len(keys):  # else the missing ones are reported already
            failures = sum((Counter(record.failures) for record in records), Counter[str]())
            if (summary.rows, summary.failures) != (sum(record.rows for record in records), failures):
                yield "their summary and their records count differently"

    def _name(self, key: str) -> str:
        if layout.SCORED.parse(key):
            return f"scores {_scorer(key)} at {self._size}"
        place, number = _placed(key)
        return f"scores {place.scorer} of shard {number} at {self._size}"


def _placed(key: str) -> tuple[Place, int]:
    parts = layout.SCORE.parts(key)
    number = parts.pop("number")
    return Place(**parts), number


def _scorer(summary: str) -> str:
    return str(layout.SCORED.parts(summary)["scorer"])


def _data_name(place: Place, number: int) -> str:
    """The key of a table up to its hash."""
    return layout.SCORES.named(f"{number:05d}", scorer=place.scorer)


def _failures(table: pa.Table) -> dict[str, int]:
    """Cause -> count, from the last column if that is one of causes."""
    last = table.column(table.num_columns - 1)
    if table.num_columns < 2 or not pa.types.is_string(last.type):
        return {}
    return dict(Counter(cause for cause in last.to_pylist() if cause))

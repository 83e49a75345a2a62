"""The tables of scores and captions beside a plan's shards, held against their records and against the shards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from data_prep.plan import Plan
from data_prep.score import Place, ScoreSummary
from data_prep.stream import in_order
from data_prep.verify.looking import Report, looked
from data_prep.verify.shards import Shards
from infra.errors import RecordError
from infra.records import ScoreRecord, read_record
from infra.shards import read_index, read_parquet
from infra.store import Store


class ScoreTables(Report):
    """Those of a plan at one size, of every scorer."""

    def __init__(self, store: Store, plan: Plan, size: str, shards: Shards) -> None:
        super().__init__(store)
        self.tables = 0
        self.again: list[str] = []  # keys of records, of tables or of all together, to be written again
        self._plan, self._size, self._shards = plan, size, shards
        self._records: dict[str, ScoreRecord] = {}

    def read(self) -> None:
        there: dict[str, set[int]] = defaultdict(set)
        keys = []
        for entry in self.store.list(f"scores/{self._plan.digest}/{self._size}/"):
            path = Path(entry.key)
            if path.suffix == ".json" and path.stem.isdecimal():
                there[path.parent.name].add(int(path.stem))
                keys.append(entry.key)
        for key, found in zip(keys, in_order(lambda key: looked(partial(self._problems, key)), keys), strict=True):
            self.tables += 1
            if self.note(self._name(key), found):
                self.again.append(key)
        self._check_summaries(there)

    def objects(self) -> list[str]:
        """The damaged ones of the tables that must be made again."""
        keys = {key: record for record in self.again for key in self._candidates(record)}
        return self.damaged(keys, lambda key: self._name(keys[key]))

    def _candidates(self, key: str) -> Iterator[str]:
        """What the record names; where nobody can tell what it named, all that may be its table."""
        if record := self._records.get(key):
            yield record.table.key
        elif key.startswith("scores/"):
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
        if shard is not None:  # else they are made again after their shard
            index = read_index(self.store, shard, ["key", "accepted"])
            if not table["key"].equals(index["key"].filter(index["accepted"])):
                yield "it is not of the samples that the shard holds"

    def _check_summaries(self, there: dict[str, set[int]]) -> None:
        numbers = sorted(self._plan.all_numbers(self._size))
        for entry in list(self.store.list(f"scored/{self._plan.digest}/{self._size}/")):
            scorer = Path(entry.key).parent.name
            place = Place(self._plan.digest, self._size, scorer)
            known = numbers if entry.key == place.summary_key(numbers) else []
            missing = sorted(set(known) - there[scorer])
            if missing:
                self.problems.append(
                    f"{self._name(entry.key)}: {len(missing)} shards have none, the first {missing[0]}"
                )
                self.again += [place.key(number) for number in missing]
            keys = [place.key(number) for number in known]
            if self.note(self._name(entry.key), looked(partial(self._summary_problems, entry.key, keys))):
                self.again.append(entry.key)

    def _summary_problems(self, key: str, keys: list[str]) -> Iterator[str]:
        summary = read_record(self.store, key, ScoreSummary)
        records = [self._records[key] for key in keys if key in self._records]
        if keys and len(records) == len(keys):  # else something is wrong with those that are not there
            failures = sum((Counter(record.failures) for record in records), Counter[str]())
            if (summary.rows, summary.failures) != (sum(record.rows for record in records), failures):
                yield "their summary and their records count differently"

    def _name(self, key: str) -> str:
        if key.startswith("scored/"):
            return f"scores {Path(key).parent.name} at {self._size}"
        place, number = _placed(key)
        return f"scores {place.scorer} of shard {number} at {self._size}"


def _placed(key: str) -> tuple[Place, int]:
    _, plan, size, scorer, name = key.split("/")
    return Place(plan, size, scorer), int(Path(name).stem)


def _data_name(place: Place, number: int) -> str:
    """How the keys of a table begin: its hash follows."""
    return f"data/scores/{place.scorer}/{number:05d}-"


def _failures(table: pa.Table) -> dict[str, int]:
    """Of the last column, if it is one of causes."""
    last = table.column(table.num_columns - 1)
    if table.num_columns < 2 or not pa.types.is_string(last.type):
        return {}
    return dict(Counter(cause for cause in last.to_pylist() if cause))

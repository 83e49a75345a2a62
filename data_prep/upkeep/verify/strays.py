"""Records of snapshots of which nobody can tell whose they are, since they cannot be read, or are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.upkeep.verify.looking import Looked, Report, said
from infra import layout
from infra.errors import RecordError
from infra.records import SnapshotOutput, SnapshotRecord, StageRecord, read_record
from infra.store import Store


class Strays(Report):
    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.again: list[str] = []

    def read(self) -> None:
        there = {key: self._wrong(key) for key in layout.SNAPSHOT.keys(self.store)}
        wrong = {key: problem for key, problem in there.items() if problem}
        for stage in layout.STAGE.keys(self.store, kind=SnapshotOutput.kind):
            key = read_record(self.store, stage, StageRecord).of(SnapshotOutput).record
            if key not in there:
                wrong[key] = "its record is gone, and its stage says that it is there"
        for key, problem in wrong.items():
            self.note(f"snapshot {Path(key).stem}", Looked([problem], []))
            self.again.append(key)

    def objects(self) -> list[str]:
        keys = {data: key for key in self.again for data in self._data_of(key)}
        return self.damaged(keys, lambda key: f"snapshot {Path(keys[key]).stem}")

    def _wrong(self, key: str) -> str:
        try:
            read_record(self.store, key, SnapshotRecord)
        except RecordError as error:
            return said(error)
        return ""

    def _data_of(self, key: str) -> Iterator[str]:
        """All that may be its own."""
        yield from (entry.key for entry in self.store.list(layout.SELECTIONS.named(Path(key).stem)))

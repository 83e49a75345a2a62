"""Records of snapshots of which nobody can tell whose they are, since they cannot be read, or are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.verify.looking import Looked, Report, said
from infra.errors import RecordError
from infra.records import SnapshotRecord, StageRecord, read_record
from infra.store import Store


class Strays(Report):
    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.again: list[str] = []

    def read(self) -> None:
        there = {entry.key: self._wrong(entry.key) for entry in self.store.list("snapshots/")}
        wrong = {key: problem for key, problem in there.items() if problem}
        for entry in self.store.list("stages/snapshot/"):
            key = str(read_record(self.store, entry.key, StageRecord).output["record"])
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
        yield from (entry.key for entry in self.store.list(f"data/snapshots/{Path(key).stem}-"))

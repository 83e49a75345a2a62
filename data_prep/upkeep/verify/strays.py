"""Records of snapshots that cannot be read or are missing, so that nobody can tell which plan they belong to."""

from __future__ import annotations

from pathlib import Path

from data_prep.upkeep.verify.report import Findings, Report, message, snapshot_name
from infra import layout
from infra.errors import RecordError
from infra.records import SnapshotOutput, SnapshotRecord, StageRecord, read_record
from infra.store import Store


class Strays(Report):
    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.again: list[str] = []

    def read(self) -> None:
        messages = {key: self._error(key) for key in layout.SNAPSHOT.keys(self.store)}
        wrong = {key: error for key, error in messages.items() if error}
        for stage in layout.STAGE.keys(self.store, kind=SnapshotOutput.kind):
            key = read_record(self.store, stage, StageRecord).of(SnapshotOutput).record
            if key not in messages:
                wrong[key] = "its record is gone, and its stage says that it is there"
        for key, problem in wrong.items():
            self.note(snapshot_name(key), Findings([problem], []))
            self.again.append(key)

    def objects(self) -> list[str]:
        """What the records named is unknown, so all objects that are called after their snapshots are read."""
        stored = {key: self.store.list(layout.SELECTIONS.named(Path(key).stem)) for key in self.again}
        return self.damaged({entry.key: snapshot_name(key) for key, entries in stored.items() for entry in entries})

    def _error(self, key: str) -> str:
        try:
            read_record(self.store, key, SnapshotRecord)
        except RecordError as error:
            return message(error)
        return ""

"""Snapshots: their selections, compared row by row with the indexes of a plan's shards, and damaged records."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.prepare.plan import Plan
from data_prep.sources import parquet
from data_prep.upkeep.verify.report import Findings, Report, examine, message
from data_prep.upkeep.verify.shards import Shards
from infra import layout
from infra.errors import RecordError
from infra.records import DataObject, SnapshotOutput, SnapshotRecord, StageRecord, fetch_data, read_record
from infra.shards import SELECTION_SCHEMA, read_index, read_parquet, shard_prefix, tar_number
from infra.store import Store

_PLACES = ("offset", "length", "width", "height")


class Selections(Report):
    """The selections of all snapshots of a plan, at every size."""

    def __init__(self, store: Store, plan: Plan, shards: dict[str, Shards]) -> None:
        super().__init__(store)
        self.snapshots = 0
        self.again: list[str] = []  # keys of the records of snapshots that must be made again
        self._shards = {shard_prefix(plan.digest, size): of_size for size, of_size in shards.items()}
        self._records: dict[str, SnapshotRecord] = {}

    def read(self) -> None:
        for key in list(layout.SNAPSHOT.keys(self.store)):
            try:
                record = read_record(self.store, key, SnapshotRecord)
            except RecordError:
                continue  # nobody can tell which plan it belongs to: `Strays` reports it
            if record.shards in self._shards:
                self.snapshots += 1
                self._records[key] = record
                if self.note(_name(key), examine(partial(self._problems, record))):
                    self.again.append(key)

    def objects(self) -> list[str]:
        records = {_name(key): self._records[key] for key in self.again}
        return self.damaged(
            {data.key: name for name, r in records.items() for data in (r.selection, r.held_out, r.by_shard)}
        )

    def _problems(self, record: SnapshotRecord) -> Iterator[str]:
        if record.counts[-1][1] != record.rows + record.held_out_rows:
            yield "its record counts differently from its own steps"
        counts = read_parquet(self.store, record.by_shard, ["rows", "held_out_rows"])
        sums = [pc.sum(counts[name]).as_py() or 0 for name in counts.column_names]
        if sums != [record.rows, record.held_out_rows]:
            yield "its counts by shard and its record differ"
        for name, half, rows in (
            ("selection", record.selection, record.rows),
            ("held-out rows", record.held_out, record.held_out_rows),
        ):
            for problem in self._half_problems(self._shards[record.shards], half, rows):
                yield f"its {name}: {problem}"

    def _half_problems(self, shards: Shards, half: DataObject, rows: int) -> Iterator[str]:
        with TemporaryDirectory(prefix="pixnerd-verify-") as folder:
            path = Path(folder, "selection.parquet")
            fetch_data(self.store, half, path)
            with parquet.opened(path.open("rb"), half.key) as file:
                if not set(SELECTION_SCHEMA.names) <= set(file.schema_arrow.names):
                    yield "it lacks columns"
                    return
                if file.metadata.num_rows != rows:
                    yield f"it has {file.metadata.num_rows} rows, and by its record {rows}"
                for group in range(file.num_row_groups):
                    for part in _by_tar(file.read_row_group(group)):
                        yield from self._part_problems(shards, part)

    def _part_problems(self, shards: Shards, part: pa.Table) -> Iterator[str]:
        """Check rows that name the same tar."""
        tar = str(part["tar"][0].as_py())
        shard = shards.whole(tar_number(tar))
        if shard is None:
            return  # it is made again, and so is whatever lists its images
        if shard.tar is None or shard.tar.key != tar:
            yield f"it lists images of {tar}, which no shard's record names"
            return
        index = read_index(self.store, shard, ["key", "source", "accepted", *_PLACES])
        index = index.filter(index["accepted"])
        places = np.searchsorted(index["offset"].to_numpy(), part["offset"].to_numpy())
        expected = index.take(np.minimum(places, index.num_rows - 1))
        same = np.ones(part.num_rows, bool)
        for name in _PLACES:
            same &= part[name].to_numpy() == expected[name].to_numpy()
        for name in ("key", "source"):
            same &= pc.equal(part[name].cast(pa.string()), expected[name]).to_numpy()
        lengths = [pc.list_value_length(part[name]).to_numpy() for name in ("captions", "caption_weights")]
        same &= (lengths[0] == lengths[1]) & (lengths[0] > 0)
        if not same.all():
            wrong = part["key"].to_pylist()[int(np.argmin(same))]
            yield f"{(~same).sum()} rows are not as the index of their shard says, the first {wrong}"


class Strays(Report):
    """Records of snapshots that cannot be read or are missing: nobody can tell which plan they belong to."""

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
            self.note(_name(key), Findings([problem], []))
            self.again.append(key)

    def objects(self) -> list[str]:
        """What the records named is unknown, so all objects that are called after their snapshots are read."""
        stored = {key: self.store.list(layout.SELECTIONS.named(Path(key).stem)) for key in self.again}
        return self.damaged({entry.key: _name(key) for key, entries in stored.items() for entry in entries})

    def _error(self, key: str) -> str:
        try:
            read_record(self.store, key, SnapshotRecord)
        except RecordError as error:
            return message(error)
        return ""


def _by_tar(table: pa.Table) -> Iterator[pa.Table]:
    """Split a table by tar. The rows of a tar are next to each other, as they are in the order of their shards."""
    tars = table["tar"].combine_chunks()
    codes = (tars if isinstance(tars, pa.DictionaryArray) else tars.dictionary_encode()).indices.to_numpy()
    ends = [*(np.flatnonzero(np.diff(codes)) + 1), table.num_rows] if table.num_rows else []
    for start, end in zip([0, *ends], ends, strict=False):
        yield table.slice(int(start), int(end - start))


def _name(key: str) -> str:
    return f"snapshot {Path(key).stem}"

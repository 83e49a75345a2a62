"""Where everything lies in a store: the only file that spells its folders and keys.

    SHARD.at(plan="ab12", size="256", number=3)   shards/ab12/256/00003.json
    SHARD.under(plan="ab12")                      shards/ab12/
    SHARD.parse("shards/ab12/256/00003.json")     {"plan": "ab12", "size": "256", "number": 3}
    IMAGES.at(size="256")                         data/256

A `Place` is the form of the keys of one kind of record or table. It also tells the record's class, and the folders of
the data objects that such a record may name. A `Folder` holds data objects, which have the hash of their bytes in their
names (see `records.put_data`). Data objects under `data/` are shared by records: `gc` deletes those that no record
names. Data objects beside a record belong to it and stay with it.

To store something new, add a line here. Tests check that no other file spells a key, and that every record lies, and
names data, where this file says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.store import Store

DATA = "data/"

# The form of a part of a key, where it is not simply everything up to the next slash.
_PARTS = {
    "home": r"(?:training|imported)/[^/]+",  # the folder of a network: see TRAINING and IMPORTED
    "batch": r"[^/.]+",
    "part": ".+",  # folders in a checkpoint's folder
    "size": r"(?!(?:tables|unpacked|originals|scores|snapshots|forgotten)(?:/|$))[^/]+",  # other folders under data/
}
_FIELD = re.compile(r"\{(\w+)(?::0(\d+)d)?\}")


@dataclass(frozen=True)
class Spelling:
    """The form of a key, or of the beginning of one, such as `plans/{plan}/{number:05d}.parquet`."""

    spelling: str

    def at(self, **parts: Any) -> str:
        return self.spelling.format(**parts)

    def under(self, **parts: Any) -> str:
        """The common beginning of all keys with these parts, which must be the first ones."""
        for field in _FIELD.finditer(self.spelling):
            if field[1] not in parts:
                return self.spelling[: field.start()].format(**parts)
        return self.at(**parts)

    def parse(self, key: str) -> dict[str, Any] | None:
        """The parts of a key; None if the key has another form."""
        match = self._pattern.fullmatch(key)
        if match is None:
            return None
        numbers = {field[1] for field in _FIELD.finditer(self.spelling) if field[2]}
        return {name: int(part) if name in numbers else part for name, part in match.groupdict().items()}

    def parts(self, key: str) -> dict[str, Any]:
        """The parts of a key that is known to have this form."""
        parts = self.parse(key)
        assert parts is not None, f"{key} is not spelt {self.spelling}"
        return parts

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern, end = "", 0
        for field in _FIELD.finditer(self.spelling):
            part = rf"\d{{{field[2]},}}" if field[2] else _PARTS.get(field[1], "[^/]+")
            pattern += f"{re.escape(self.spelling[end : field.start()])}(?P<{field[1]}>{part})"
            end = field.end()
        return re.compile(pattern + re.escape(self.spelling[end:]))


@dataclass(frozen=True)
class Folder(Spelling):
    """Data objects: <folder>/<name>-<sha256>.<suffix>."""

    def named(self, name: str, **parts: Any) -> str:
        """The beginning of the keys of all objects of this name; a hash follows."""
        return f"{self.at(**parts)}/{name}-"

    def holds(self, key: str) -> bool:
        """Whether the object lies directly in this folder."""
        return self._pattern.fullmatch(key.rpartition("/")[0]) is not None


@dataclass(frozen=True)
class Place(Spelling):
    """Records or tables of one kind."""

    record: str = ""  # name of the records' class; empty for a table
    names: tuple[Folder, ...] = ()  # folders of the data objects that it may name

    def keys(self, store: Store, **parts: Any) -> Iterator[str]:
        """The keys of this place that are in the store and have these parts."""
        return (entry.key for entry in store.list(self.under(**parts)) if self.parse(entry.key) is not None)


# Data that records of several kinds share

IMAGES = Folder("data/{size}")  # <number>.tar with the images of a shard, <number>.parquet its index
TABLES = Folder("data/tables")  # listings, and inputs that were turned into Parquet
UNPACKED_TARS = Folder("data/unpacked")
ORIGINALS = Folder("data/originals")  # tars of what was downloaded, and tables of it
SCORES = Folder("data/scores/{scorer}")  # <number>.parquet with what a scorer gave for a shard's images
SELECTIONS = Folder("data/snapshots")
FORGOTTEN_ITEMS = Folder("data/forgotten")

# Preparation: inputs, downloads, shards

PLANNED = Place("plans/{plan}/{number:05d}.parquet", names=(TABLES, UNPACKED_TARS))  # the shards to make
EDITION = Place("plans/{plan}/{edition}.json", "Edition")
LOOKED = Place("looked/{listing}/{first:012d}-{rows:01d}.parquet")  # properties of source files when they were read
UNPACKED = Place("unpacked/{tar}.json", "UnpackedRecord", (UNPACKED_TARS,))
BATCH = Place("downloads/batches/{batch}.{attempt:01d}.json", "BatchRecord", (ORIGINALS,))
DROPPED = Place("downloads/batches/{batch}.{attempt:01d}.dropped.json", "Dropped")
LINKS = Place("downloads/lists/{list}/{generation:01d}/links.json", "LinksRecord", (ORIGINALS,))
RETRY = Place("downloads/lists/{list}/{generation:01d}/again.json", "RetryRecord", (ORIGINALS,))
CATALOGUE = Place("downloads/catalogue/{number:05d}.json", "CatalogueRecord", (ORIGINALS,))
SHARDS = Spelling("shards/{plan}/{size}/")
SHARD = Place("shards/{plan}/{size}/{number:05d}.json", "ShardRecord", (IMAGES,))
PREPARED = Place("prepared/{plan}/{edition}.json", "PrepareSummary")

# What is known of the images of shards, and datasets made of them

SCORE = Place("scores/{plan}/{size}/{scorer}/{number:05d}.json", "ScoreRecord", (SCORES,))
SCORED = Place("scored/{plan}/{size}/{scorer}/{shards}.json", "ScoreSummary")
FORGOTTEN = Place("forgotten/{items}.json", "ForgottenRecord", (FORGOTTEN_ITEMS,))
SNAPSHOT = Place("snapshots/{digest}.json", "SnapshotRecord", (SELECTIONS, IMAGES))  # its selection names the images
EXPORT = Place("exports/{digest}.json", "ExportRecord")

# Networks. A `home` is the folder of one network.

TRAINING = Spelling("training/{run}")
IMPORTED = Spelling("imported/{digest}")
TRAINED_FILES = Folder("{home}/checkpoint")
TRAINED_PARTS = Folder("{home}/checkpoint/{part}")  # such as the text encoder's files
STATE_PARTS = Folder("{home}/state")  # <step>-<rank>-<attempt>.safetensors
AVERAGES_PARTS = Folder("{home}/average")  # <step>-<rank>-<number>.safetensors
CURVES = Folder("{home}")
CHECKPOINT = Place("{home}/checkpoint.json", "CheckpointRecord", (TRAINED_FILES, TRAINED_PARTS, CURVES))
CHECKPOINT_AT = Place(  # of a step on the way
    "{home}/checkpoints/{step:08d}.json", "CheckpointRecord", (TRAINED_FILES, TRAINED_PARTS, CURVES)
)
AVERAGES = Place("{home}/averages/{step:08d}.json", "AveragesRecord", (AVERAGES_PARTS,))
STATE = Place("{home}/states/{step:08d}-{attempt}.json", "TrainingState", (STATE_PARTS,))
OLD_STATE = Place("{home}/states/{step:08d}.json", "TrainingState", (STATE_PARTS,))  # schema 1: without attempts
DRIVER = Place("{home}/drivers/{number:06d}.json", "DriverRecord")
ENCODER_FILES = Folder("encoders/{stage}/{encoder}")

# Pictures and scores, a folder for each stage

VERDICTS = Folder("evaluations/{stage}")
JUDGED = Folder("evaluations/{stage}/pictures")  # tars of the pictures that were judged
REPORT = Place("evaluations/{stage}/report.json", "EvalReport", (VERDICTS, JUDGED))
DRAWN = Place("evaluations/{stage}/drawn/{first:05d}.json", "Chunk", (JUDGED,))  # of a chunk's first prompt
ANSWERED = Place("evaluations/{stage}/judged/{first:05d}.json", "Chunk", (VERDICTS,))
REFERENCE_FILES = Folder("references/{stage}")  # of real pictures, for all evaluations that are compared with them
REFERENCE_TAKEN = Place("references/{stage}/taken/{first:05d}.json", "Chunk", (REFERENCE_FILES,))
REFERENCE_SEEN = Place("references/{stage}/seen/{first:05d}.json", "Chunk", (REFERENCE_FILES,))
SWEEPING = Place("evaluations/{stage}/swept/{first:05d}.json", "Chunk", (JUDGED,))
SWEEP = Place("evaluations/{stage}/sweep.json", "Sweep", (VERDICTS, JUDGED))
SAMPLED = Folder("samples/{stage}/pictures")
SAMPLING = Place("samples/{stage}/drawn/{first:05d}.json", "Chunk", (SAMPLED,))
SAMPLES = Place("samples/{stage}/drawn.json", "Drawn", (SAMPLED,))
PAGES = Folder("reports")

# Workflows

STAGE = Place("stages/{kind}/{digest}.json", "StageRecord", (ENCODER_FILES, PAGES))
RUNNING = Place("running/{run}.json", "RunRecord")
RUN = Place("workflows/begun/{run}.json", "WorkflowRun")
RUN_STAGE = Place("workflows/stages/{run}/{stage}.json", "RunStage")  # what a run has settled of a stage
RUN_END = Place("workflows/ended/{run}.json", "RunEnd")

# Attempts at the work of a stage, numbered from 1: see orchestration/lease.py

ATTEMPTS = Spelling("attempts/{kind}/{digest}/")
HELD = Place("attempts/{kind}/{digest}/{number:04d}/held.json", "Attempt")
ENDED = Place("attempts/{kind}/{digest}/{number:04d}/end.json", "AttemptEnd", (ENCODER_FILES, PAGES))
RECORDED = Place("attempts/{kind}/{digest}/{number:04d}/recorded")  # the stage's record has been written
LOG = Place("attempts/{kind}/{digest}/{number:04d}/log.txt")

CORPUS = Spelling("corpus/{stage}")  # a local folder, in the workflow's own

BEAT = ".beat"  # added to the key of a driver's, a run's or an attempt's record: its heartbeat

# Folders that may be in a store that is a local folder, but are not part of it: `gc` and the like skip them.
NOT_OURS = (
    *("corpus/", "mlartifacts/"),  # a workflow's own files
    "originals/",  # downloads of earlier versions, which nothing reads any more
)

PLACES = tuple(place for place in list(globals().values()) if isinstance(place, Place))
FOLDERS = tuple(folder for folder in list(globals().values()) if isinstance(folder, Folder))


def place_of(key: str) -> Place | None:
    """The place that a key of a record or a table belongs to."""
    return next((place for place in PLACES if place.parse(key) is not None), None)

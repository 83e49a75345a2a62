"""Where everything lies in a store: the one page that names its folders and keys.

    SHARD.at(plan="ab12", size="256", number=3)   shards/ab12/256/00003.json
    SHARD.under(plan="ab12")                      shards/ab12/
    SHARD.parse("shards/ab12/256/00003.json")     {"plan": "ab12", "size": "256", "number": 3}
    IMAGES.at(size="256")                         data/256

A `Place` is where one kind of record or table lies: how its keys are spelt, the class of the record, and the folders of
data objects that it may name. A `Folder` holds data objects, which have the hash of their bytes in their names (see
`records.put_data`). Two kinds of them: what lies under `data/` is shared, and `gc` deletes what nobody names; what lies
beside its own record stays with it.

To store something new, add a line here; the tests hold that nothing else spells a key, that every record lies where
this page says, and that it names what this page says.
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

# What a part of a key may be, where it is not simply all up to the next slash.
_PARTS = {
    "home": r"(?:training|imported)/[^/]+",  # of a trained network: see TRAINING and IMPORTED
    "batch": r"[^/.]+",
    "part": ".+",  # of a checkpoint: folders in its folder
    "size": r"(?!(?:tables|unpacked|originals|scores|snapshots|forgotten)(?:/|$))[^/]+",  # what else lies under data/
}
_FIELD = re.compile(r"\{(\w+)(?::0(\d+)d)?\}")


@dataclass(frozen=True)
class Spelling:
    """How a key, or the beginning of one, is spelt."""

    spelling: str

    def at(self, **parts: Any) -> str:
        return self.spelling.format(**parts)

    def under(self, **parts: Any) -> str:
        """How all keys begin that have these parts, which are the first ones."""
        for field in _FIELD.finditer(self.spelling):
            if field[1] not in parts:
                return self.spelling[: field.start()].format(**parts)
        return self.at(**parts)

    def parse(self, key: str) -> dict[str, Any] | None:
        """The parts of a key; None if it is spelt otherwise."""
        found = self._pattern.fullmatch(key)
        if found is None:
            return None
        numbers = {field[1] for field in _FIELD.finditer(self.spelling) if field[2]}
        return {name: int(part) if name in numbers else part for name, part in found.groupdict().items()}

    def parts(self, key: str) -> dict[str, Any]:
        """The parts of a key that is known to be of this spelling."""
        found = self.parse(key)
        assert found is not None, f"{key} is not spelt {self.spelling}"
        return found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        found, end = "", 0
        for field in _FIELD.finditer(self.spelling):
            part = rf"\d{{{field[2]},}}" if field[2] else _PARTS.get(field[1], "[^/]+")
            found += f"{re.escape(self.spelling[end : field.start()])}(?P<{field[1]}>{part})"
            end = field.end()
        return re.compile(found + re.escape(self.spelling[end:]))


@dataclass(frozen=True)
class Folder(Spelling):
    """Data objects: <folder>/<name>-<sha256>.<suffix>."""

    def named(self, name: str, **parts: Any) -> str:
        """How the keys begin of the objects of this name, whose hash follows."""
        return f"{self.at(**parts)}/{name}-"

    def holds(self, key: str) -> bool:
        """Whether the object lies just there."""
        return self._pattern.fullmatch(key.rpartition("/")[0]) is not None


@dataclass(frozen=True)
class Place(Spelling):
    """Records or tables of one kind."""

    record: str = ""  # the name of the class of the records that lie there; none: no record, but a table
    names: tuple[Folder, ...] = ()  # where the data lie that it may name

    def keys(self, store: Store, **parts: Any) -> Iterator[str]:
        """The keys that the store holds of this place, as far as they have these parts."""
        return (entry.key for entry in store.list(self.under(**parts)) if self.parse(entry.key) is not None)


# Data that records of several kinds share

IMAGES = Folder("data/{size}")  # <number>.tar with the images of a shard, <number>.parquet its index
TABLES = Folder("data/tables")  # listings, and inputs that were turned into Parquet
UNPACKED_TARS = Folder("data/unpacked")
ORIGINALS = Folder("data/originals")  # what was downloaded, and the tables that tell of it
SCORES = Folder("data/scores/{scorer}")  # <number>.parquet with a scorer's word on the images of a shard
SELECTIONS = Folder("data/snapshots")
FORGOTTEN_ITEMS = Folder("data/forgotten")

# Preparation: inputs, downloads, shards

PLANNED = Place("plans/{plan}/{number:05d}.parquet", names=(TABLES, UNPACKED_TARS))  # the shards that are to be made
EDITION = Place("plans/{plan}/{edition}.json", "Edition")
LOOKED = Place("looked/{listing}/{first:012d}-{rows:01d}.parquet")  # what files were like when they were read
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

# Networks. A `home` is where all of one lies.

TRAINING = Spelling("training/{run}")
IMPORTED = Spelling("imported/{digest}")
TRAINED_FILES = Folder("{home}/checkpoint")
TRAINED_PARTS = Folder("{home}/checkpoint/{part}")  # the text encoder's files, say
STATE_PARTS = Folder("{home}/state")  # <step>-<rank>-<attempt>.safetensors
CURVES = Folder("{home}")
CHECKPOINT = Place("{home}/checkpoint.json", "CheckpointRecord", (TRAINED_FILES, TRAINED_PARTS, CURVES))
STATE = Place("{home}/states/{step:08d}-{attempt}.json", "TrainingState", (STATE_PARTS,))
OLD_STATE = Place("{home}/states/{step:08d}.json", "TrainingState", (STATE_PARTS,))  # of schema 1, without attempts
DRIVER = Place("{home}/drivers/{number:06d}.json", "DriverRecord")
ENCODER_FILES = Folder("encoders/{stage}/{encoder}")

# Pictures and scores, a folder for each stage

VERDICTS = Folder("evaluations/{stage}")
JUDGED = Folder("evaluations/{stage}/pictures")  # tars of the pictures that were judged
REPORT = Place("evaluations/{stage}/report.json", "EvalReport", (VERDICTS, JUDGED))
PICTURES = Place("evaluations/{stage}/pictures.json", "Pictures", (JUDGED,))
SAMPLED = Folder("samples/{stage}/pictures")
SAMPLES = Place("samples/{stage}/drawn.json", "Drawn", (SAMPLED,))
PAGES = Folder("reports")

# Workflows

STAGE = Place("stages/{kind}/{digest}.json", "StageRecord", (ENCODER_FILES, PAGES))
RUNNING = Place("running/{run}.json", "RunRecord")
CORPUS = Spelling("corpus/{stage}")  # a folder of this machine, below the workflow's

BEAT = ".beat"  # after the key of a driver's or a run's record: what says that it is alive

# What lies in a folder that is a store as well, and is not ours to look into.
NOT_OURS = (
    *("corpus/", "mlartifacts/"),  # a workflow's own files
    "originals/",  # what earlier versions wrote of their downloads, and nobody reads any more
)

PLACES = tuple(place for place in list(globals().values()) if isinstance(place, Place))
FOLDERS = tuple(folder for folder in list(globals().values()) if isinstance(folder, Folder))


def place_of(key: str) -> Place | None:
    """Where a record or a table lies that has this key."""
    return next((place for place in PLACES if place.parse(key) is not None), None)

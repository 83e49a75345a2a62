"""Records: small JSON objects that say which work is done and where its data lie. All folders share these classes.

    StageRecord         one stage of a workflow is done: from what, with which settings, giving what
    ├── ShardRecord     one shard of prepared images: its tar, its index, and how many inputs were accepted or rejected
    ├── ScoreRecord     what one scorer gave for one shard's images: a table of scores or captions
    ├── SnapshotRecord  a dataset version: the rows of which shards, after which filter, split how
    ├── ExportRecord    a copy of a snapshot's samples that was written outside of the store, and where it is
    ├── CheckpointRecord  a trained network at a step, and the data and settings it came from
    ├── AveragesRecord  all moving averages of a network's weights at a step, from which others are made afterwards
    └── EvalReport      scores with intervals, from which checkpoint, judge and prompts

A record is written after the data that it names, and only if there is none yet: so its existence means that the work is
done, and of several writers the first wins. Data objects carry their sha256 in their keys, to check the bytes against.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, model_validator

from infra.config import canonical_json, digest
from infra.errors import DataError, RecordError
from infra.files import appearing, sha256_of
from infra.store import Store


class Plain(BaseModel):
    """A value that never changes. Unknown fields are refused: one of a newer schema must not be understood in part."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Plain):
    newest_schema: ClassVar[int] = 1
    schema_version: int = 1

    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))


class DataObject(Plain):
    """A data object in the store. Its key contains its sha256, so that its bytes can be checked."""

    key: str
    sha256: str
    size: int


class ShardRecord(Record):
    plan: str  # digest of inputs and settings: one plan, one set of shards
    size: str  # what the images were made into: "256", or a bucket set's name
    number: int
    tar: DataObject | None  # None if every input was rejected
    index: DataObject  # one row per input, accepted or not
    accepted: int
    rejected: dict[str, int]  # cause -> count
    versions: dict[str, str]  # of the decoders that made the pixels

    @property
    def inputs(self) -> int:
        return self.accepted + sum(self.rejected.values())


class ScoreRecord(Record):
    plan: str
    size: str
    scorer: str  # digest of its settings and weights
    number: int  # the shard's
    table: DataObject  # `key` and the scorer's columns, one row for each accepted sample, in the index's order
    rows: int
    failures: dict[str, int]  # cause -> rows without a value
    versions: dict[str, str]


class SnapshotRecord(Record):
    shards: str  # key prefix of the shard records it was made from
    size: str
    selection: DataObject  # Parquet: one row per training sample
    held_out: DataObject  # the same, for the samples that training never sees
    by_shard: DataObject  # Parquet: one row for every shard, source and bucket, with its counts
    rows: int
    held_out_rows: int
    counts: list[tuple[str, int]]  # ("accepted", n), then (step, rows left after it); the last is rows + held_out_rows
    by_source: dict[str, list[int]]  # source -> its part of each count
    caption_shares: dict[str, float]  # kind or rule of the mix -> its part of what training draws
    forgotten: list[str]  # the lists of forgotten items that may concern its shards


class ExportRecord(Record):
    snapshot: str  # key of its record
    digest_of_snapshot: str  # of the record
    to: str  # the URL of a folder or a store
    layout: str


class CheckpointRecord(Record):
    folder: str  # key prefix of config.json, model.safetensors, ...
    files: dict[str, DataObject]  # name in the folder -> object
    run: str  # digest of the training run
    step: int
    position: int  # samples consumed
    snapshot: str  # digest of the snapshot it saw
    start_from: str | None  # digest of the checkpoint it started from
    parameters: int
    curve: DataObject | None = None  # Parquet: one row per logged step
    truncated_captions: int | None = None  # of those it was trained on: longer than the network's text tokens


class Profile(Plain):
    """How an average of the weights weighs the steps before it: see `training.profiles`. Either field but not both."""

    decay: float | None = None
    warmup: bool = False  # whether the decay began low
    sigma_rel: float | None = None


class AveragesPart(Plain):
    """A rank's share of all averages at a step."""

    files: dict[str, DataObject]  # name of an average -> its values, a flat tensor for each parameter
    ranges: dict[str, tuple[int, int]]  # parameter -> which of its values


class AveragesRecord(Record):
    run: str  # digest of the training run
    step: int
    position: int  # samples consumed
    snapshot: str  # digest of the snapshot it saw
    start_from: str | None  # digest of the checkpoint it started from
    profiles: dict[str, Profile]  # name of an average -> what it is
    parts: list[AveragesPart]


class Interval(Plain):
    """A score with its 95 % interval; None where there are too few items to compute one."""

    value: float
    low: float | None
    high: float | None


class EvalReport(Record):
    # In 2 a score may have no interval, in 3 the devices are told, in 4 the prompts' name, the judge's weights and what
    # it saw. A report that needs none of it is still of schema 1.
    newest_schema = 4
    protocol: str  # "geneval", "dpg", "fid"
    judge: str
    prompts: str  # digest of the prompt set
    checkpoint: str  # digest of the checkpoint record
    images: int
    failed: int  # items without a score: they count as wrong
    scores: dict[str, Interval]  # "geneval/overall", "geneval/counting", ...
    details: DataObject  # Parquet: one row per image with the verdict and its reason
    pictures: list[DataObject]  # tars of PNGs, <prompt>-<image>.png
    devices: list[str] = []  # on which pictures were drawn and judged
    prompt_set: str = ""  # the name of the prompts
    weights: dict[str, str] = {}  # the judge's networks -> the sha256 of local weights, or their tag
    detections: list[DataObject] = []  # Parquet: what the judge saw, from which verdicts can be made again

    @model_validator(mode="before")
    @classmethod
    def _oldest_fitting_schema(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if any(fields.get(name) for name in ("prompt_set", "weights", "detections")):
            return {"schema_version": 4, **fields}
        if fields.get("devices"):
            return {"schema_version": 3, **fields}
        scores = [Interval.model_validate(score) for score in fields.get("scores", {}).values()]
        return fields if all(score.low is not None for score in scores) else {"schema_version": 2, **fields}

    def values(self) -> dict[str, float]:
        """The scores without their intervals."""
        return {name: score.value for name, score in self.scores.items()}


class Output(Plain):
    """What a stage produced, as its record tells it to later stages and to the commands that read a store.

    Each kind of stage has its own subclass, which gives the kind its name: `class GateOutput(Output, kind="gate")`.
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Output]]] = {}

    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        Output._kinds[kind] = cls

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """The kinds whose outputs are of this class."""
        return tuple(name for name, output in Output._kinds.items() if issubclass(output, cls))

    @classmethod
    def of_kind(cls, kind: str) -> type[Output]:
        if kind not in Output._kinds:
            raise ValueError(f"{kind} is not a kind of stage that this pixnerd knows")
        return Output._kinds[kind]


class CorpusOutput(Output, kind="corpus"):
    folder: str  # on the machine that ran the stage
    files: dict[str, int]  # suffix -> count


class SizeSummary(Plain):
    shards: str  # key prefix of the records
    count: int
    accepted: int
    rejected: dict[str, int]  # cause -> count; an input that was downloaded again counts with its latest result


class PrepareSummary(Record, Output, kind="prepare"):
    """What became of every input, at every size. It does not depend on which machines did the work."""

    plan: str
    edition: str
    inputs: int
    tried_again: dict[str, int]  # cause of a failed download -> how many of these were downloaded again
    sizes: dict[str, SizeSummary]
    versions: list[dict[str, str]]  # more than one if the decoders changed between runs


class ScoreSummary(Record, Output, kind="score"):
    """What became of every accepted sample. It does not depend on which machines did the work."""

    plan: str
    size: str
    scorer: str
    settings: dict[str, Any]  # the scorer's, if they change results and are not defaults; weights as their sha256
    columns: list[str]
    shards: int
    rows: int
    failures: dict[str, int]  # cause -> rows without a value
    versions: list[dict[str, str]]  # more than one if libraries or machines changed between runs


class SnapshotOutput(Output, kind="snapshot"):
    record: str  # key of its SnapshotRecord
    rows: int
    counts: list[tuple[str, int]]
    size: str
    classes: int | None = None  # of its labels, if it has some


class EncodersOutput(Output, kind="encoders"):
    text: dict[str, DataObject]  # name in the encoder's folder -> object
    vision: dict[str, DataObject]


class TrainOutput(Output, kind="train"):
    record: str  # key of its CheckpointRecord
    parameters: int
    images_seen: int
    image_size: int | None = None  # records of earlier versions do not tell it


class SampleOutput(Output, kind="sample"):
    record: str  # key of the list of pictures
    sheet: str  # path of the contact sheet, on the machine that ran the stage
    prompts: int


class EvaluateOutput(Output, kind="evaluate"):
    record: str  # key of its EvalReport
    scores: dict[str, float]


class DpgOutput(EvaluateOutput, kind="dpg"):
    """The same of DPG-Bench, whose scores are in percent."""


class FidOutput(EvaluateOutput, kind="fid"):
    """The same of FID and kin, of which most are distances: lower is better."""


class Verdict(Plain):
    """Whether a score passes one rule of a gate."""

    score: str
    value: float
    limit: str
    passed: bool


class GateOutput(Output, kind="gate"):
    passed: bool
    verdicts: list[Verdict]

    def failed(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.passed]


class RegisterOutput(Output, kind="register"):
    model: str
    version: str
    alias: str
    source: str  # URL of the record of its checkpoint


class ReportOutput(Output, kind="report"):
    page: DataObject
    path: str  # of the page, on the machine that ran the stage


OutputT = TypeVar("OutputT", bound=Output)


class StageRecord(Record):
    stage: str  # its name in the workflow
    kind: str
    digest_of_work: str  # digest of kind, settings and inputs; part of this record's key
    inputs: dict[str, str]  # the setting that names a stage -> the digest of that stage's work
    settings: dict[str, Any]  # those that change results
    output: SerializeAsAny[Output]  # of the kind's own subclass
    versions: dict[str, str]
    started: str
    seconds: float

    @model_validator(mode="before")
    @classmethod
    def _typed_output(cls, fields: dict[str, Any]) -> dict[str, Any]:
        output = fields.get("output")
        if isinstance(output, Output):
            return fields
        return {**fields, "output": Output.of_kind(str(fields.get("kind"))).model_validate(output)}

    def of(self, kind: type[OutputT]) -> OutputT:
        """The stage's output, which must be of this class."""
        if not isinstance(self.output, kind):
            raise RecordError(
                f"the stage `{self.stage}` is a `{self.kind}`, not a `{kind.kind}`", remedy="name a stage of that kind"
            )
        return self.output


R = TypeVar("R", bound=Record)


def put_data(store: Store, prefix: str, name: str, data: bytes | Path, sha256: str = "") -> DataObject:
    """Store a data object as `prefix/stem-sha256.suffix`; one that is stored already is not sent again.

    For example `data/256/00012-<sha256>.tar`. `sha256`: that of the file, if the caller knows it from writing it.
    """
    if isinstance(data, bytes):
        sha256, size = hashlib.sha256(data).hexdigest(), len(data)
    else:
        sha256, size = sha256 or sha256_of(data), data.stat().st_size
    stem, dot, suffix = name.partition(".")
    data_object = DataObject(key=f"{prefix.rstrip('/')}/{stem}-{sha256}{dot}{suffix}", sha256=sha256, size=size)
    if store.size(data_object.key) != size:
        store.put(data_object.key, data)
    return data_object


def named_sha256(key: str) -> str | None:
    """The sha256 in a data object's key; None if there is none."""
    match = re.search(r"-([0-9a-f]{64})(?:\.[^/]*)?$", key)
    return match and match[1]


def get_data(store: Store, data: DataObject) -> bytes:
    """The bytes of a data object, checked against its sha256."""
    content = store.get(data.key)
    if hashlib.sha256(content).hexdigest() != data.sha256:
        raise _damaged(store, data.key)
    return content


def fetch_data(store: Store, data: DataObject, path: Path) -> None:
    """Download a data object; a file whose bytes do not have its sha256 never appears at `path`."""
    _fetch(store, data.key, data.sha256, path)


def fetch_named(store: Store, key: str, path: Path) -> None:
    """The same where only the data object's key is known."""
    sha256 = named_sha256(key)
    if sha256 is None:
        raise DataError(
            f"{store.url}/{key} carries no hash in its name, so nobody can tell whether it is whole",
            remedy="make what names it anew: pixnerd writes no such name",
        )
    _fetch(store, key, sha256, path)


def _fetch(store: Store, key: str, sha256: str, path: Path) -> None:
    with appearing(path) as unfinished:
        store.download(key, unfinished)
        if sha256_of(unfinished) != sha256:
            raise _damaged(store, key)


def _damaged(store: Store, key: str) -> DataError:
    return DataError(
        f"{store.url}/{key} is damaged: its bytes do not have the hash in its name",
        remedy="if it is of shards, scores, snapshots or downloads, run `pixnerd data verify --drop-damaged`; else "
        "delete it and the record that names it; then run again: it is made anew",
    )


def write_record(store: Store, key: str, record: Record) -> bool:
    """True if this writer was the first. Otherwise the record is dropped, since the stored one already means done."""
    return store.create(key, (canonical_json(record) + "\n").encode())


def recorded(store: Store, key: str, record: R) -> R:
    """Write the record; returns the one that is in the store, which is that of the first writer."""
    return record if write_record(store, key, record) else read_record(store, key, type(record))


def read_record(store: Store, key: str, kind: type[R]) -> R:
    data = store.get(key)
    try:
        plain = json.loads(data)
        version = plain.get("schema_version")
        if isinstance(version, int) and version > kind.newest_schema:
            raise RecordError(
                f"{key} is a {kind.__name__} of schema {version}, this pixnerd reads up to {kind.newest_schema}",
                remedy="use the pixnerd that wrote it, or a newer one",
            )
        return kind.model_validate(plain)
    except (ValueError, AttributeError, ValidationError) as error:
        raise RecordError(
            f"{store.url}/{key} is not a readable {kind.__name__} ({type(error).__name__})",
            remedy="remove the object; the stage that wrote it will run again",
        ) from None

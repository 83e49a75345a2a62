"""A FID run: draw pictures, look at them and at real ones with Inception, and write the report's record last."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_prep.scores.settings import ClipSettings
from infra import layout
from infra.actors import Needs, PoolSettings
from infra.causes import first_line
from infra.config import digest, operational
from infra.errors import EvaluationError, SettingsError
from infra.files import sha256_of
from infra.records import CheckpointRecord, EvalReport, Interval, SnapshotRecord, put_data, recorded
from infra.shards import parquet_bytes, read_selection
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Shelf, Show, make
from pipelines.evaluation.fid import Gaussian, frechet, kernel_distance, precision_recall
from pipelines.evaluation.generate import DrawingSettings, Order, chunked, generate, to_look_at
from pipelines.evaluation.rows import likeliest_caption, spread
from pipelines.evaluation.seeing import Readable, Rows, Seeing, Side, added_up, of_adm
from pipelines.evaluation.tars import PICTURES, ToJudge, packed, place, png_of, tars

TASK = "fid"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class FidSettings(PoolSettings):
    count: int = Field(10_000, ge=2, description="pictures that are drawn")
    reference: str | None = Field(
        None, description="real pictures: an npz of ADM's evaluations, or a folder; none: those of the stage `data`"
    )
    reference_count: int = Field(
        50_000, ge=2, description="real pictures at most, spread over a snapshot or folder; the first of an npz"
    )
    split: Literal["training", "held_out"] = Field("training", description="rows of `data` that are looked at")
    inception: str = operational(
        "weights-inception-2015-12-05-6726825d.pth", description="torch-fidelity's file of Inception's weights"
    )
    clip: ClipSettings | None = Field(
        None, description="a CLIP that compares pictures and prompts; none: no such score"
    )
    sampling: DrawingSettings = DrawingSettings()

    @property
    def weights(self) -> Path:
        return Path(self.inception).expanduser().absolute()


class Real(NamedTuple):
    """Where the real pictures come from."""

    settings: FidSettings
    data: SnapshotRecord | None

    def identity(self) -> list[object]:
        """What results depend on besides the settings: the real pictures, and the networks that look at them."""
        clip = self.settings.clip
        return [*self._seen_by(), *([] if clip is None else [clip.identity()])]

    def _seen_by(self) -> list[object]:
        return [self.digest(), _sha256(self.settings.weights)]

    def digest(self) -> str:
        if self.settings.reference is None:
            if self.data is None:
                raise SettingsError("there are no real pictures to compare with", remedy="name them: --set reference=")
            return digest([self.data.digest(), self.settings.split, self.settings.reference_count])
        path = self._path()
        files = [path] if path.is_file() else _pictures(path)
        return digest([*(_sha256(file) for file in files), self.settings.reference_count])

    def _path(self) -> Path:
        path = Path(str(self.settings.reference)).expanduser()
        if not path.exists():
            raise SettingsError(f"there is no reference {path}", remedy="name an .npz file, or a folder of pictures")
        return path

    def side(self, store: Store, show: Show, needs: Needs) -> Side:
        """What Inception sees in them. It lies in the store beside no evaluation, since many share it."""
        settings, at = self.settings, digest(self._seen_by())
        if settings.reference is not None and (path := self._path()).is_file():
            if told := of_adm(path):
                return told
            items = self._taken(store, at, _of_npz(path))
        elif settings.reference is not None:
            files = _pictures(self._path())
            items = self._taken(store, at, _of_files(files[number] for number in spread(len(files))))
        else:
            items = _rows(store, self.data, settings)
        seeing = Seeing(store, settings.weights, settings.sampling.batch)
        return added_up(store, make(Shelf(store, layout.REFERENCE_SEEN, at), seeing, items, needs, show))

    def _taken(self, store: Store, at: str, pictures: Iterable[tuple[str, bytes]]) -> dict[int, Readable]:
        shelf = Shelf(store, layout.REFERENCE_TAKEN, at)
        return {
            first: ToJudge(chunk.data[PICTURES], list(names), {})
            for first, names, chunk in _put(
                shelf, islice(pictures, self.settings.reference_count), self.settings.sampling.batch
            )
        }


@cache
def _sha256(path: Path) -> str:
    if not path.is_file():
        from pipelines.evaluation.inception import MISSING

        raise SettingsError(f"there is no file {path}", remedy=MISSING)
    return sha256_of(path)


def _pictures(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    if len(found) < 2:
        raise EvaluationError(
            f"{folder} holds {len(found)} pictures", remedy="name a folder of PNG, JPEG or WebP files"
        )
    return found


def _of_npz(path: Path) -> Iterator[tuple[str, bytes]]:
    """The pictures `arr_0` of an npz one by one: all of them would take gigabytes."""
    try:
        yield from _unpacked(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise EvaluationError(
            f"{path} is no reference that can be read ({first_line(error)})",
            remedy="download it again, or make it anew: an array `arr_0` of uint8 [count, height, width, 3]",
        ) from None


def _unpacked(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise EvaluationError(
                f"the pictures in {path} are {dtype} of shape {shape}", remedy="give uint8 of [count, height, width, 3]"
            )
        size = int(np.prod(shape[1:]))
        for _ in range(shape[0]):
            yield ".png", png_of(np.frombuffer(file.read(size), np.uint8).reshape(shape[1:]))


def _of_files(files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    return ((file.suffix, file.read_bytes()) for file in files)


def _put(shelf: Shelf, pictures: Iterable[tuple[str, bytes]], batch: int) -> Iterator[tuple[int, list[str], Chunk]]:
    """Pictures, by suffix and bytes, as chunks of tars as if they had been drawn."""
    numbered = enumerate(pictures)
    while some := {f"{number:05d}-0{suffix.lower()}": data for number, (suffix, data) in islice(numbered, batch)}:
        names = [name.partition(".")[0] for name in some]
        first, _ = place(names[0])
        yield first, names, shelf.put(first, packed(some, {}), "a folder")


def _rows(store: Store, data: SnapshotRecord | None, settings: FidSettings) -> dict[int, Readable]:
    assert data is not None, "its digest asks for it"
    columns = ["tar", "offset", "length"]
    table = read_selection(store, data, held_out=settings.split == "held_out", columns=columns)
    picked = table.take(list(islice(spread(table.num_rows), settings.reference_count))).to_pydict()
    places = list(zip(picked["tar"], picked["offset"], picked["length"], strict=True))
    size = settings.sampling.batch
    return {first: Rows(first, tuple(places[first : first + size])) for first in range(0, len(places), size)}


def prompts_of(store: Store, data: SnapshotRecord | None, classes: int | None, settings: FidSettings) -> list[str]:
    """Labels in turn for a network that draws from labels; else the likeliest captions of rows spread over the data."""
    if classes is not None:
        return [str(number % classes) for number in range(settings.count)]
    if data is None:
        raise SettingsError("there are no prompts", remedy="name captions in a workflow's stage: `data`")
    table = read_selection(store, data, held_out=settings.split == "held_out", columns=["captions", "caption_weights"])
    if not table.num_rows:
        raise EvaluationError("the data hold no rows of this split", remedy="choose another `split`")
    rows = [number * table.num_rows // settings.count for number in range(settings.count)]
    return [likeliest_caption(row) for row in table.take(rows).to_pylist()]


def fid(
    store: Store,
    stage: str,
    checkpoint: CheckpointRecord,
    prompts: Sequence[str],
    real: Real,
    show: Show,
    needs: Needs | None = None,
) -> EvalReport:
    """Evaluate a checkpoint; what an interrupted run drew and saw is used again. Every picture has its own noise."""
    settings, needs = real.settings, needs or real.settings.needs
    order = Order(store, stage, checkpoint, 1, settings.sampling, needs, apart=True)
    drawn = generate(order, prompts, show)
    items = to_look_at(chunked(prompts, 1, settings.sampling), 1, drawn)
    return _judged(store, stage, checkpoint.digest(), prompts, drawn, items, real, show, needs)


def fid_of_folder(store: Store, folder: Path, real: Real, show: Show) -> EvalReport:
    """Compare a folder's pictures with real ones: another model's, perhaps."""
    settings, files = real.settings, _pictures(folder)
    pictures = digest([_sha256(file) for file in files])
    stage = digest([pictures, real.identity(), settings.chosen()])
    shelf = Shelf(store, layout.DRAWN, stage)
    taken = list(_put(shelf, _of_files(files), settings.sampling.batch))
    items = {first: ToJudge(chunk.data[PICTURES], names, {}) for first, names, chunk in taken}
    drawn, names = [chunk for _, _, chunk in taken], [file.name for file in files]
    return _judged(store, stage, f"folder-{pictures}", names, drawn, items, real, show, settings.needs)


def _judged(
    store: Store,
    stage: str,
    checkpoint: str,
    prompts: Sequence[str],
    drawn: Sequence[Chunk],
    items: Mapping[int, Readable],
    real: Real,
    show: Show,
    needs: Needs,
) -> EvalReport:
    clip = None if real.settings.clip is None else real.settings.clip.located()
    seeing = Seeing(store, real.settings.weights, real.settings.sampling.batch, clip, prompts)
    seen = make(Shelf(store, layout.ANSWERED, stage), seeing, items, needs, show)
    failed = {place(name): cause for chunk in (*drawn, *seen) for name, cause in chunk.failed.items()}
    count = sum(len(item.there) for item in items.values()) - sum(len(chunk.failed) for chunk in seen)
    scores = scores_of(real.side(store, show, needs), added_up(store, seen))
    report = EvalReport(
        protocol="fid",
        judge=f"inception-{_sha256(real.settings.weights)[:8]}, {count} pictures",
        prompts=digest([*prompts, real.digest()]),
        checkpoint=checkpoint,
        images=count + len(failed),
        failed=len(failed),
        scores={f"fid/{name}": Interval(value=value, low=None, high=None) for name, value in scores.items()},
        details=put_data(
            store, layout.VERDICTS.at(stage=stage), "pictures.parquet", parquet_bytes(_table(prompts, items, failed))
        ),
        pictures=tars(drawn),
        devices=sorted({chunk.device for chunk in (*drawn, *seen)}),
    )
    return recorded(store, layout.REPORT.at(stage=stage), report)


def scores_of(real: Side, made: Side) -> dict[str, float]:
    """Every score for which both sides tell enough."""
    scores = {"fid": frechet(*_alike(real.pictures, made.pictures))}
    if real.spatial is not None and made.spatial is not None:
        scores["sfid"] = frechet(*_alike(real.spatial, made.spatial))
    if real.features is not None and made.features is not None:
        scores["kid"] = kernel_distance(real.features, made.features)
        scores["precision"], scores["recall"] = precision_recall(real.features, made.features)
    if made.inception_score is not None:
        scores["inception_score"] = made.inception_score
    if made.clip_score is not None:
        scores["clip_score"] = made.clip_score
    return scores


def _alike(a: Gaussian, b: Gaussian) -> tuple[Gaussian, Gaussian]:
    if len(a.mean_D) != len(b.mean_D):
        raise EvaluationError(
            f"the reference has {len(a.mean_D)} features, and these pictures {len(b.mean_D)}",
            remedy="name a reference that was made by the same network",
        )
    return a, b


def _table(prompts: Sequence[str], items: Mapping[int, Readable], failed: Mapping[tuple[int, int], str]) -> pa.Table:
    numbers = sorted({place(name)[0] for item in items.values() for name in item.there} | {k for k, _ in failed})
    reasons = ["" if (cause := failed.get((number, 0))) is None else f"not seen: {cause}" for number in numbers]
    columns = {
        "task": [TASK] * len(numbers),
        "prompt": numbers,
        "text": [prompts[number] for number in numbers],
        "image": [0] * len(numbers),
        "correct": [not reason for reason in reasons],
        "reasons": reasons,
    }
    return pa.table(columns)

"""Runs by labels, on images of several sizes: they resume bit for bit, draw by label, and learn the shape world."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_prep.images.sizes import Buckets
from data_prep.shapes.world import COLOURS, SHAPES, Description, Noun, draw, render
from data_prep.snapshots.build import snapshot
from data_prep.snapshots.settings import SnapshotSettings
from infra.config import parse
from infra.errors import SettingsError
from infra.records import CheckpointRecord, SnapshotRecord, get_data
from infra.store import FileStore
from tests.data_prep.corpora import prepare_here, settings_for
from tests.training import small_run
from training import checkpoint
from training import model as models
from training.diffusion.draws import draw as drawn
from training.diffusion.draws import normal
from training.diffusion.objective import velocity_loss
from training.diffusion.prediction import as_velocity
from training.job import Job
from training.loader.batches import Batches
from training.loader.cache import Folder, Tars
from training.loader.conditions import Labels
from training.loader.order import DataSettings
from training.loader.reader import Reader
from training.loader.selection import Selection
from training.loop import train
from training.sampling import Artist, SampleSettings
from training.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("alone")

SUBJECTS = [(shape, colour) for shape in SHAPES for colour in list(COLOURS)[:2]]  # a label is the subject's place
RATIOS = ((96, 96), (96, 96), (48, 96), (96, 48))  # width, height
BUCKETS = Buckets(name="b48", side=48, step=16)
SIZES = {(32, 64), (48, 48), (64, 32)}  # width, height
MODEL: dict[str, Any] = {"task": "class", "classes": len(SUBJECTS), "image_size": 48, "patch_size": 8}
MODEL |= {"hidden": 48, "heads": 2, "blocks": 2, "field_blocks": 1, "field_channels": 8, "open_gates": True}
SETTINGS: dict[str, Any] = {"preset": "XL/16", "model": MODEL, "batch": 8, "precision": "fp32", "save_every": 3}
SETTINGS |= {"objective": {"repa": 0.0}, "ema": {"decay": 0.9}, "reading": {"lanes": 4}, "log_every": 1, "steps": 7}
SETTINGS |= {"optim": {"lr": 1e-2}, "train_text": 0}


class Data(NamedTuple):
    labelled: SnapshotRecord
    captioned: SnapshotRecord


def write_corpus(folder: Path, count: int) -> None:
    """One thing a picture, cut to one of the ratios; the table tells which subject it is."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(count):
        label, (width, height) = index % len(SUBJECTS), RATIOS[index // len(SUBJECTS) % len(RATIOS)]
        shape, colour = SUBJECTS[label]
        scene = draw(Description((Noun(shape, colour=colour),)), random.Random(index))
        left, top = (96 - width) // 2, (96 - height) // 2
        image = Image.fromarray(render(scene, 96)).crop((left, top, left + width, top + height))
        image.save(folder / f"images/{index}.png")
        rows.append({"image": f"images/{index}.png", "label": label, "caption": f"a {colour} {shape}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")


def write_data(folder: Path, store: FileStore, count: int) -> Data:
    write_corpus(folder, count)
    settings = settings_for(folder)
    source = settings.sources[0].model_copy(update={"captions": ["caption"], "keep": ["label"]})
    changes = {"sources": [source], "sizes": [BUCKETS], "rows_per_shard": 20}
    plan = prepare_here(store, settings.model_copy(update=changes))
    labels = {"column": "label", "classes": len(SUBJECTS)}
    return Data(
        *(
            snapshot(store, plan.digest, plan.edition, parse(SnapshotSettings, {"size": "b48"} | further))
            for further in ({"labels": labels}, {})
        )
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    return FileStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def both(store: FileStore, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("data") / "corpus", store, 120)


@pytest.fixture(scope="module")
def data(both: Data) -> SnapshotRecord:
    return both.labelled


class Killed(Exception):
    pass


def run(store: FileStore, data: SnapshotRecord, name: str, kill_after: int = 0, **changes: Any) -> CheckpointRecord:
    nothing: dict[str, dict[str, Any]] = {"text": {}, "vision": {}}
    job: Job = small_run.job_in(store, data, nothing, name, **SETTINGS | changes)

    def say(message: dict[str, Any]) -> None:
        if message["event"] == "saved" and message["step"] == kill_after:
            raise Killed

    return train(job, say)


def test_a_run_on_buckets_resumes_bit_for_bit_and_draws_by_label(
    store: FileStore, data: SnapshotRecord, tmp_path: Path
):
    whole = run(store, data, "whole")
    with pytest.raises(Killed):
        run(store, data, "resumed", kill_after=3)
    resumed = run(store, data, "resumed")
    assert whole.files["model.safetensors"].sha256 == resumed.files["model.safetensors"].sha256
    folder = checkpoint.fetch(store, whole, tmp_path / "checkpoint")
    assert not (folder / "text").exists()
    settings = SampleSettings(steps=2)
    one, other, again = Artist.load(folder).draw([0, 3, 0], [5, 5, 5], settings)
    assert one.shape == (48, 48, 3)
    assert (one == again).all() and (one != other).any()


def test_pictures_of_a_buckets_size_are_drawn_with_patches_of_the_trained_size(
    store: FileStore, data: SnapshotRecord, tmp_path: Path
):
    folder = checkpoint.fetch(store, run(store, data, "whole"), tmp_path / "checkpoint")
    artist = Artist.load(folder)
    assert artist.draw([0], [5], SampleSettings(steps=2, size=(32, 64))).shape == (1, 32, 64, 3)
    assert not artist.net.config.fixed_grid
    artist.draw([0], [5], SampleSettings(steps=2, size=(96, 96)))
    assert artist.net.config.fixed_grid


OBJECTIVE = {"repa": 0.5, "repa_block": 1, "repa_until": 4, "routing": {"share": 0.5, "blocks": [1, 1]}}
OBJECTIVE |= {"perceptual": {"lpips": 0.1, "dino": 0.01}}
EVERYTHING: dict[str, Any] = {"objective": OBJECTIVE, "validation": {"every": 3, "batches": 6}, "export_every": 3}


@pytest.mark.parametrize("by", Data._fields)
def test_every_option_goes_with_buckets(store: FileStore, both: Data, tmp_path: Path, by: str):
    """What looks at patches follows each batch's grid, and a network of labels needs no text encoder."""
    data: SnapshotRecord = getattr(both, by)
    data = data.model_copy(update={"held_out": data.selection, "held_out_rows": data.rows})
    encoders, model = small_run.write_encoders(tmp_path / "encoders", store), MODEL | {"prediction": "image"}
    if by == "captioned":
        model = small_run.MODEL | {"task": "text", "image_size": 48, "prediction": "image"}
    else:
        encoders["text"] = {}
    settings = SETTINGS | EVERYTHING | {"model": model, "train_text": int(by == "captioned")}
    lpips = str(small_run.write_lpips(tmp_path / "lpips"))
    job = small_run.job_in(store, data, encoders, by, lpips=lpips, **settings)
    saved: list[dict[str, Any]] = []
    record = train(job, lambda message: saved.append(message) if message["event"] == "saved" else None)
    assert record.curve is not None
    rows = pq.read_table(pa.BufferReader(get_data(store, record.curve))).to_pylist()
    assert [row["step"] for row in rows if row["repa/cosine"] is not None] == [1, 2, 3, 4]
    assert all(row["perceptual/lpips"] > 0 and row["perceptual/dino"] > 0 for row in rows)
    assert [row["step"] for row in rows if row["val/loss"] is not None] == [3, 6]
    assert ("text/config.json" in record.files) == (by == "captioned")
    assert all(store.exists(message["checkpoint"]) for message in saved)


@pytest.mark.parametrize("setting", [{"train_text": 1}, {"pack_text": True}])
def test_labels_refuse_settings_of_a_text_encoder(setting: dict[str, Any]):
    with pytest.raises(SettingsError, match=f"{next(iter(setting))}: a network that draws from labels"):
        parse(TrainSettings, SETTINGS | setting)


def batches_of(store: FileStore, data: SnapshotRecord, cache: Path) -> Batches:
    folder = Folder(cache, 1)
    reader = Reader(Selection.open(store, data.selection, folder), Tars(store, folder))

    return Batches(
        reader,
        DataSettings(lanes=4),
        batch=8,
        draw=partial(drawn, 1, drop=0.0),
        condition=Labels(reader, len(SUBJECTS)),
        seed=1,
    )


@pytest.mark.slow
def test_the_shape_world_is_learnt_by_label_in_every_bucket(tmp_path: Path):
    """With other noise and times, an image's own label explains it better than another subject's, at each size."""
    store = FileStore(tmp_path / "store")
    data = write_data(tmp_path / "corpus", store, 600).labelled
    changes: dict[str, Any] = {"steps": 400, "save_every": 400, "log_every": 20, "optim": {"lr": 2e-3, "warmup": 20}}
    record = run(store, data, "learnt", **changes, batch=16, ema={"decay": 0.98})
    net = models.load(checkpoint.fetch(store, record, tmp_path / "checkpoint"))
    batches = batches_of(store, data, tmp_path / "cache")
    gains: dict[tuple[int, int], list[float]] = {size: [] for size in SIZES}
    for position in range(0, 400, 8):
        batch = batches.read(position)
        assert batch.labels_B is not None
        images_BCHW = batch.images_BCHW.float() / 127.5 - 1
        noise_BCHW = normal(batch.bits_BN, tuple(images_BCHW.shape[1:]))

        def loss(labels_B: torch.Tensor) -> float:
            with torch.no_grad():
                made = velocity_loss(as_velocity(net), images_BCHW, labels_B, noise_BCHW, batch.t_B)  # noqa: B023
            return float(made.per_sample_B.mean())

        other = (batch.labels_B + 1) % len(SUBJECTS)
        gains[images_BCHW.shape[3], images_BCHW.shape[2]].append(loss(other) - loss(batch.labels_B))
    means = {size: sum(values) / len(values) for size, values in gains.items()}
    assert min(means.values()) > 0, means

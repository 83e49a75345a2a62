"""A training run small enough for a test: real shards and snapshot, a Qwen3 and a DINOv2 of some thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_prep.shapes.corpus import write_corpus
from data_prep.snapshots.build import snapshot
from data_prep.snapshots.settings import SnapshotSettings
from infra.config import parse
from infra.records import CheckpointRecord, DataObject, SnapshotRecord, put_data
from infra.store import Store
from infra.tracking import NOWHERE
from tests.data_prep.corpora import prepare_here, settings_for
from training.encoders import lpips as lpips_module
from training.encoders import text, vision
from training.job import Job
from training.settings import TrainSettings

MODEL = {
    "image_size": 16,
    "patch_size": 8,
    "hidden": 32,
    "heads": 2,
    "blocks": 2,
    "text_dim": 32,
    "text_tokens": 16,
    "text_blocks": 0,
    "text_padding": "masked",
    "open_gates": True,
    "field_blocks": 1,
    "field_channels": 8,
}
SETTINGS = {
    "preset": "XXL/16-dct",  # its training settings are the defaults; the small presets have their own
    "model": MODEL,
    "steps": 6,
    "batch": 4,
    "precision": "fp32",
    "optim": {"lr": 1e-3},
    "objective": {"repa": 0.5, "repa_block": 1},
    "ema": {"decay": 0.9},
    "reading": {"lanes": 4},
    "train_text": 1,
    "log_every": 1,
    "save_every": 3,
}


def write_data(folder: Path, store: Store, count: int = 60) -> SnapshotRecord:
    write_corpus(folder, count, seed=0, size=32)
    source = {"tables": ["captions.parquet"], "captions": ["caption", "caption_long"], "keep": [], "licence": ""}
    settings = settings_for(folder)
    sources = [settings.sources[0].model_copy(update=source)]
    plan = prepare_here(store, settings.model_copy(update={"sources": sources, "sizes": [16], "rows_per_shard": 20}))
    return snapshot(store, plan.digest, plan.edition, SnapshotSettings(size=16))


def write_encoders(folder: Path, store: Store) -> dict[str, dict[str, DataObject]]:
    text.build_tiny(folder / "text", ["a photo of a red circle"] * 9, hidden=32, layers=1, heads=2, vocab=300)
    vision.build_tiny(folder / "vision", hidden=16, layers=1, heads=2, patch_size=8, image_size=16)
    return {
        part: {path.name: put_data(store, f"encoders/{part}", path.name, path) for path in (folder / part).iterdir()}
        for part in ("text", "vision")
    }


def write_lpips(folder: Path, widths: tuple[int, ...] = (4, 6, 8, 8, 8)) -> Path:
    """A small VGG-16 with random weights under torchvision's names, and LPIPS's weights in a file of their own."""
    torch.manual_seed(0)
    features, before = {}, 3
    for block, width in zip(lpips_module.BLOCKS, widths, strict=True):
        for index in block:
            features[f"features.{index}.weight"] = torch.randn(width, before, 3, 3) / (3 * before) ** 0.5
            features[f"features.{index}.bias"] = torch.randn(width) / 10
            before = width
    heads = {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1) for number, width in enumerate(widths)}
    folder.mkdir(parents=True)
    save_file(features, folder / "vgg16.safetensors")
    torch.save(heads, folder / "vgg.pth")
    return folder


def job_in(
    store: Store,
    snapshot: SnapshotRecord,
    encoders: dict[str, dict[str, DataObject]],
    name: str,
    start_from: CheckpointRecord | None = None,
    lpips: str | None = None,
    **changes: Any,
) -> Job:
    return Job(
        store=store,
        prefix=f"training/{name}",
        digest=name,
        settings=parse(TrainSettings, SETTINGS | changes),
        snapshot=snapshot,
        text=encoders["text"],
        vision=encoders["vision"],
        lpips=lpips,
        start_from=start_from,
        run=NOWHERE,
    )

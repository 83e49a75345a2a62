"""Makes averages afterwards: other decays and widths than a run tracked, out of those that it kept on its way.

Karras et al. 2023, arXiv 2312.02696: averages of two widths, kept at a few dozen steps, span nearly every other one.
The kept averages are read one after another and added up, so a network of any size takes the memory of two copies.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from infra import layout
from infra.errors import CheckpointError
from infra.records import AveragesPart, AveragesRecord, CheckpointRecord, Profile, fetch_data, read_record
from infra.store import Store
from training import checkpoint
from training import model as models
from training.ema import PUBLISHED
from training.encoders.text import TextEncoder
from training.model.fit import Shape, shapes
from training.profiles import Kept, fit
from training.publish import Frame

MOST_MISPLACED = 0.05  # of the weight: with more than that it would be another average than the one asked for


class Made(NamedTuple):
    step: int
    averages: int  # how many of the kept ones it is made of
    misplaced: float  # see `training.profiles.Fit`


def averages(store: Store, home: str) -> list[AveragesRecord]:
    """What a run has kept, ordered by step."""
    keys = sorted(layout.AVERAGES.keys(store, home=home))
    if not keys:
        raise CheckpointError(
            f"no averages were kept under {store.url}/{home}",
            remedy="train with ema.sigma_rel: [0.05, 0.1] and ema.keep_every",
        )
    return [read_record(store, key, AveragesRecord) for key in keys]


def make(
    store: Store, home: str, folder: Path, *, decay: float | None, sigma_rel: float | None, step: int | None
) -> Made:
    """Writes a checkpoint's folder with another average as of a step that was kept, the last one by default."""
    records = averages(store, home)
    steps = [record.step for record in records]
    if step is not None and step not in steps:
        raise CheckpointError(f"no averages of step {step} were kept", remedy=f"steps: {', '.join(map(str, steps))}")
    last = steps[-1] if step is None else step
    records = [record for record in records if record.step <= last]
    warmup = decay is not None and records[-1].profiles[PUBLISHED].warmup
    wanted = Kept(Profile(decay=decay, warmup=warmup, sigma_rel=sigma_rel), last)
    sources = [(record, name) for record in records for name in record.profiles]
    shares, misplaced = fit(wanted, [Kept(record.profiles[name], record.step) for record, name in sources])
    if misplaced > MOST_MISPLACED:
        raise CheckpointError(
            f"the averages that were kept do not make this one: {misplaced:.0%} of its weight would lie at other steps",
            remedy="ask for a width between those that were tracked, or train with a smaller ema.keep_every",
        )
    used = [(share, *source) for share, source in zip(shares, sources, strict=True) if share]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        frame, known = _frame(store, home, scratch, {"average": {**wanted.profile.model_dump(), "step": last}})
        trained = {parameter for part in records[-1].parts for parameter in part.ranges}
        weights = {parameter: torch.full(known[parameter], -0.0) for parameter in trained}  # x + -0.0 has the bits of x
        for share, record, average in used:
            for part in record.parts:
                _add(weights, share, store, part, average, scratch / "part.safetensors")
        frame.write(weights, folder)
    return Made(last, len(used), misplaced)


def _add(
    weights: dict[str, torch.Tensor], share: float, store: Store, part: AveragesPart, average: str, path: Path
) -> None:
    fetch_data(store, part.files[average], path)
    with safe_open(path, "pt") as file:
        for parameter, (start, end) in part.ranges.items():
            weights[parameter].view(-1)[start:end].add_(file.get_tensor(parameter), alpha=share)


def _frame(store: Store, home: str, scratch: Path, extra: dict[str, Any]) -> tuple[Frame, dict[str, Shape]]:
    """A checkpoint of the same run without its weights, and the shapes of all parameters by their names in training."""
    record = _checkpoint(store, home)
    others = {name: data for name, data in record.files.items() if name != models.WEIGHTS}
    folder = checkpoint.fetch_files(store, others, scratch / "frame")
    config, own = models.read_config(folder)
    text = TextEncoder(folder / "text", config.text_tokens) if (folder / "text").exists() else None
    head = models.header(folder / models.HEAD) if models.HEAD in others else {}
    known = {f"net.{name}": shape for name, shape in shapes(models.outline(config).state_dict()).items()}
    known |= {f"head.{name}": stored.shape for name, stored in head.items()}
    known |= {f"text.{name}": shape for name, shape in shapes(text.state_dict() if text else {}).items()}
    return Frame(config, text, own | extra), known


def _checkpoint(store: Store, home: str) -> CheckpointRecord:
    """The run's checkpoint; the newest one on the way, if the run has not ended."""
    keys = sorted(layout.CHECKPOINT_AT.keys(store, home=home))
    if published := checkpoint.published(store, home):
        return published
    if not keys:
        raise CheckpointError(
            f"the run under {store.url}/{home} has no checkpoint yet, which says what its network is",
            remedy="wait for its end, or train with export_every",
        )
    return read_record(store, keys[-1], CheckpointRecord)

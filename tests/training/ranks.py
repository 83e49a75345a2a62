"""Training runs of several ranks over gloo, forked from one process that has imported everything: a second a run.

A pytest process has threads and cannot be forked safely, so `python -m tests.training.ranks FOLDER NAME...` does it.
Of each name it writes what two runs came to, one straight to its end and one that was killed in the middle: their
curves, the hashes of what they published, and whole states, put together from the ranks' parts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file

from infra import layout
from infra.records import CheckpointRecord, DataObject, SnapshotRecord, get_data, read_record
from infra.store import FileStore
from tests.training import small_run
from tests.training.forks import forked, import_all, together
from training import loop, states
from training.ema import Ema
from training.job import Job
from training.loop import train
from training.networks import build, fetch
from training.team import Team

SETTINGS: dict[str, Any] = {
    "steps": 20,
    "save_every": 7,
    "objective": {"repa": 0.0},
    "batch": 8,
    "reading": {"lanes": 8},
    "validation": {"every": 5, "batches": 2},
}
OPTIONS: dict[str, Any] = {  # REPA ends behind the state that a killed run resumes from
    "model": small_run.MODEL | {"prediction": "image", "noise_scale": 2.0},
    "objective": {
        "repa": 0.5,
        "repa_block": 1,
        "repa_until": 10,
        "time_mean": -0.4,
        "time_deviation": 0.8,
        "perceptual": {"lpips": 0.1, "dino": 0.01, "times": [0.3, 1.0]},
        "routing": {"share": 0.5, "blocks": [1, 1]},
    },
}
STAGES: dict[str, dict[str, Any]] = {
    "zero-1": {"zero": 1},
    "zero-2": {"zero": 2},
    "zero-3": {"zero": 3},
    "offload": {"zero": 2, "offload": True},
    "muon": {"zero": 1, "optim": {"lr": 1e-3, "matrices": "muon", "weight_decay": 0.1, "text_lr": 0.1}},
    "bf16-exact": {"zero": 1, "precision": "bf16", "exact_gradients": True, "micro_batch": 2},
    "bf16-3": {"zero": 3, "precision": "bf16"},
    "averages": {
        "zero": 2,
        "ema": {"decay": 0.9, "more_decays": [0.5], "sigma_rel": [0.05, 0.1], "keep_every": 7},
        "export_every": 7,
    },
    "options": {"zero": 2, **OPTIONS},
    # Here REPA ends before that state, and the head's last gradient must not count on.
    "options-3": {"zero": 3, **OPTIONS, "objective": OPTIONS["objective"] | {"repa_until": 5}},
    "options-exact": {"zero": 1, "precision": "bf16", "exact_gradients": True, **OPTIONS},
    "anew-3": {"zero": 3, "checkpointing": "blocks"},
    "compiled-3": {"zero": 3, "checkpointing": "blocks", "compile": "blocks"},
}
LOADED: dict[str, tuple[int, dict[str, Any]]] = {  # how many ranks load the state of two ranks at ZeRO 3, and how
    "1-zero-1": (1, {"zero": 1}),
    "4-zero-1": (4, {"zero": 1}),
    "2-zero-2": (2, {"zero": 2}),
    "2-zero-3": (2, {"zero": 3}),
    "4-zero-3": (4, {"zero": 3}),
    "2-offload": (2, {"zero": 1, "offload": True}),
    "1-averages": (1, {"zero": 1, "ema": STAGES["averages"]["ema"]}),  # that of two ranks with as many averages
    "2-decay": (2, {"zero": 1, "optim": {"lr": 1e-3, "weight_decay": 0.1}}),  # in two groups: another order
}
WRITTEN = {"1-averages": "averages"}  # of what other run the state is


class Keeps(FileStore):
    """Nothing is deleted, so that the states which led to a checkpoint stay."""

    def delete(self, key: str) -> None: ...


def trained(job: Job, kill_after: int | None = None) -> list[int]:
    def work(rank: int) -> None:
        def say(message: dict[str, Any]) -> None:
            if message["event"] == "saved" and message["step"] == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        train(job, say)

    return together(job.settings.workers, work)


def whole_state(job: Job, step: int) -> dict[str, torch.Tensor]:
    """A committed state's tensors by kind and parameter, each put together from its ranges."""
    [key] = [key for at, key in states._keys(job.store, job.prefix) if at == step]
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in read_record(job.store, key, states.TrainingState).files:
        for name, tensor in load(get_data(job.store, file.data)).items():
            pieces.setdefault(name, []).append((file.ranges[name.partition("/")[2]][0], tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
        for name, parts in pieces.items()
    }


def write_run(job: Job, folder: Path) -> None:
    record = read_record(job.store, f"{job.prefix}/checkpoint.json", CheckpointRecord)
    key = states.newest(job.store, job.prefix)
    assert key is not None and key.state is not None
    facts = {
        "losses": [row["train/loss"] for row in key.state.curve],
        "validated": [row["val/loss"] for row in key.state.curve if "val/loss" in row],
        "files": {name: file.sha256 for name, file in record.files.items()},
        "kept": {
            key.removeprefix(job.prefix): sorted(set(re.findall(r'"sha256":"(\w+)"', job.store.get(key).decode())))
            for key in layout.AVERAGES.keys(job.store, home=job.prefix)
        },
        "on the way": {
            key.removeprefix(job.prefix): {
                name: file.sha256 for name, file in read_record(job.store, key, CheckpointRecord).files.items()
            }
            for key in layout.CHECKPOINT_AT.keys(job.store, home=job.prefix)
        },
    }
    (folder / f"{job.digest}.json").write_text(json.dumps(facts))
    save_file(whole_state(job, key.state.step), folder / f"{job.digest}.safetensors")


def loads(job: Job, state: Job, folder: Path) -> list[int]:
    """What each rank has after it has loaded another run's state, written whole."""

    def work(rank: int) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            parts = build(job.settings, fetch(job, Path(scratch)))
            engine = loop._shard(parts, job.settings, job.settings.workers)
            ema = Ema(engine.masters, job.settings.ema)
            assert states.resume(job.store, state.prefix, Team(), engine, ema, print)
            tensors, ranges = states.collected(engine, ema)
            named = {f"{name}@{ranges[name.partition('/')[2]][0]}": t.contiguous() for name, t in tensors.items()}
            save_file(named, folder / f"part-{rank}.safetensors")

    codes = together(job.settings.workers, work)
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("part-*.safetensors"):
        for name, tensor in load_file(path).items():
            pieces.setdefault(name.partition("@")[0], []).append((int(name.partition("@")[2]), tensor))
        path.unlink()
    whole = {name: torch.cat([t for _, t in sorted(p, key=lambda part: part[0])]) for name, p in pieces.items()}
    save_file(whole, folder / f"{job.digest}.safetensors")
    return codes


def write_inputs(folder: Path, store: FileStore) -> dict[str, Any]:
    """The snapshot and the encoders; a child makes them, since what that starts must not be forked along."""
    path = folder / "inputs.json"

    def write() -> int:
        snapshot = small_run.write_data(folder / "corpus", store)
        snapshot = snapshot.model_copy(update={"held_out": snapshot.selection, "held_out_rows": snapshot.rows})
        encoders = small_run.write_encoders(folder / "encoders", store)
        small_run.write_lpips(folder / "lpips")
        files = {part: {k: f.model_dump() for k, f in files.items()} for part, files in encoders.items()}
        path.write_text(json.dumps({"snapshot": snapshot.model_dump(mode="json"), "encoders": files}))
        return 0

    assert os.waitpid(forked(write), 0)[1] == 0
    written = json.loads(path.read_text())
    encoders = {
        part: {name: DataObject.model_validate(file) for name, file in files.items()}
        for part, files in written["encoders"].items()
    }
    snapshot = SnapshotRecord.model_validate(written["snapshot"])
    return {"snapshot": snapshot, "encoders": encoders, "lpips": str(folder / "lpips")}


def main(folder: Path, names: list[str]) -> None:
    import_all()
    torch.set_num_threads(1)
    store = Keeps(folder / "store")
    inputs = write_inputs(folder, store)

    def job(name: str, ranks: int, changes: dict[str, Any]) -> Job:
        return small_run.job_in(store, **inputs, name=name, workers=ranks, **(SETTINGS | changes))

    codes: dict[str, list[int]] = {}
    runs = {name: (2, changes) for name, changes in STAGES.items()} | {"muon-alone": (1, STAGES["muon"])}
    for name in runs.keys() & names:
        straight = job(name, *runs[name])
        codes[name] = trained(straight)
        write_run(straight, folder)
    for name in STAGES:
        if f"{name}-killed" in names:
            broken = job(f"{name}-killed", 2, STAGES[name])
            codes[f"{name}-killed"] = trained(broken, kill_after=7)
            codes[f"{name}-resumed"] = trained(broken)
            write_run(broken, folder)
    if "ten-kills" in names:
        often = {"zero": 1, "save_every": 1}
        straight, broken = job("each-step", 2, often), job("ten-kills", 2, often)
        codes["each-step"] = trained(straight)
        write_run(straight, folder)
        kills = (trained(broken, kill_after=step) for step in range(1, 20, 2))
        codes["ten-kills"] = [*(code for kill in kills for code in kill), *trained(broken)]
        write_run(broken, folder)
    for name in LOADED.keys() & names:
        ranks, changes = LOADED[name]
        codes[name] = loads(job(name, ranks, changes), job(WRITTEN.get(name, "zero-3"), 2, {}), folder)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""The whole workflow, killed with SIGKILL at every stage and started again, ends where an undisturbed one does."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from infra.records import CheckpointRecord, StageRecord, TrainOutput, read_record
from infra.store import Store, open_store
from pipelines import recipes
from tests.infra.stores import misplaced

# The demo in small: every stage, two sizes, three training runs, in about a minute.
RECIPE = {
    "name": "small",
    "extends": "demo",
    "tracking": {"experiment": "small"},
    "defaults": {
        "train": {"log_every": 2, "save_every": 4, "batch": 8},
        "evaluate": {"per_task": 2, "images": 2, "sampling": {"steps": 2, "batch": 4}},
    },
    "stages": {
        "corpus": {"count": 240},
        "prepare": {"rows_per_shard": 60},
        **{name: {"steps": 30, "optim": {"warmup": 0}} for name in ("low", "high", "sft")},
        "gate": {"rules": [{"score": "geneval/overall", "at_least": 0.0}]},
    },
}
STAGES = ["corpus", "prepare", "low_data", "encoders", "low", "low_score", "high", "sft", "register", "report"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def start(recipe: Path, store: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "orchestration.cli", "run", str(recipe), "--store", str(store)]
    return subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(recipe: Path, store: Path) -> str:
    process = start(recipe, store)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out + err


def kill_during(recipe: Path, store: Path, stage: str) -> None:
    """SIGKILL to the driver while the stage runs; training is killed once it has committed a state."""
    process = start(recipe, store)
    assert process.stderr is not None
    for line in process.stderr:
        if f"> {stage} " in line and "running" in line:
            break
    else:
        pytest.fail(f"the run ended before {stage}")
    if stage in ("low", "high", "sft"):
        opened = open_store(str(store))
        while not _has_state(opened, _known(opened)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
                pytest.fail(f"the run ended before {stage} could be killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def _known(store: Store) -> set[str]:
    """The training runs that are done."""
    return {e.key.rsplit("/", 1)[0] for e in store.list("training/") if e.key.endswith("/checkpoint.json")}


def _has_state(store: Store, done: set[str]) -> bool:
    return any(e.key.split("/states/")[0] not in done for e in store.list("training/") if "/states/" in e.key)


def shards(store: Path) -> dict[str, bytes]:
    opened = open_store(str(store))
    keys = [e.key for e in opened.list("shards/")] + [e.key for e in opened.list("data/16/")]
    return {key: opened.get(key) for key in keys}


def checkpoints(store: Path) -> dict[str, dict[str, str]]:
    opened = open_store(str(store))
    found = {}
    for entry in opened.list("stages/train/"):
        record = read_record(opened, entry.key, StageRecord)
        made = read_record(opened, record.of(TrainOutput).record, CheckpointRecord)
        found[record.stage] = {name: data.sha256 for name, data in made.files.items()}
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_every_stage_it_ends_where_an_undisturbed_run_does(recipe: Path, tmp_path: Path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    finish(recipe, undisturbed)
    with closing(sqlite3.connect(undisturbed / "mlflow.db")) as mlflow:
        assert ("small",) in mlflow.execute("select name from experiments").fetchall()
    assert misplaced(open_store(str(undisturbed))) == []
    for stage in STAGES:
        kill_during(recipe, disturbed, stage)
    said = finish(recipe, disturbed)
    assert "page" in said
    assert shards(disturbed) == shards(undisturbed)
    assert checkpoints(disturbed) == checkpoints(undisturbed)

    again = finish(recipe, disturbed)
    assert again.count(" reused ") == len(recipes.load(str(recipe)).stages)
    assert " running" not in again

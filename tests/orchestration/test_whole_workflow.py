"""The whole workflow, once among the systems of others, once on this machine and killed: both end at the same bytes.

The others are a Ray head that asks for its token, and an MLflow server. Only there nothing is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from infra.records import CheckpointRecord, StageRecord, TrainOutput, read_record
from infra.store import Store, open_store
from pipelines import recipes
from tests.infra.outside import mlflow_server, ray_head
from tests.infra.stores import misplaced
from tests.orchestration.small_recipe import RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# One of each kind, and training once from nothing and once from another checkpoint.
STAGES = ["corpus", "prepare", "low_data", "encoders", "low", "low_score", "sft", "register", "report"]
# What decides how Ray is joined, and what this process may have set for a Ray of its own.
OF_RAY = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


class Undisturbed(NamedTuple):
    """A run on a head that somebody else has started, and what was told before and after it."""

    store: Path
    refused: subprocess.CompletedProcess[str]  # without the head's token
    told: dict[str, Any]
    server: str  # of MLflow


def pixnerd(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestration.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    store, home = folder / "store", folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("f" * 64)  # what any use of Ray on this machine left behind
    plain = {name: value for name, value in os.environ.items() if name not in OF_RAY} | {"HOME": str(home)}
    with mlflow_server() as server:
        with ray_head(plain) as address:
            run = ["run", str(recipe), "--store", str(store), "--on", address, "--json"]
            refused = pixnerd(run, plain)
            done = pixnerd(run, plain | {"RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_URI": server})
        assert done.returncode == 0, done.stderr
        yield Undisturbed(store, refused, json.loads(done.stdout), server)  # nothing of MLflow's is among it


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


def test_among_systems_of_others_it_ends_registered(undisturbed: Undisturbed):
    from mlflow import MlflowClient

    said = undisturbed.refused.stderr
    assert undisturbed.refused.returncode == 1
    assert "asks for a token" in said and "~/.ray/auth_token" in said and "RAY_AUTH_MODE=token" in said
    client, registered = MlflowClient(undisturbed.server), undisturbed.told["register"]["output"]
    made = client.get_model_version_by_alias(registered["model"], "champion")
    source = registered["source"]
    assert (str(made.version), made.tags["pixnerd.source"]) == (registered["version"], source)
    store = open_store(str(undisturbed.store))
    assert store.exists(source.removeprefix(f"{store.url}/"))
    for stage in ("low", "high", "sft"):
        digest = undisturbed.told[stage]["digest_of_work"]
        (found,) = client.search_runs(["1"], f"tags.`pixnerd.digest` = '{digest}'")
        assert found.info.status == "FINISHED"
        steps = [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")]
        assert steps == list(range(2, 31, 2))
    assert not (undisturbed.store / "mlflow.db").exists()
    assert misplaced(store) == []


def test_killed_at_every_kind_of_stage_it_ends_where_the_undisturbed_run_did(
    recipe: Path, undisturbed: Undisturbed, tmp_path: Path
):
    disturbed = tmp_path / "disturbed"
    for stage in STAGES:
        kill_during(recipe, disturbed, stage)
    said = finish(recipe, disturbed)
    assert "page" in said
    assert shards(disturbed) == shards(undisturbed.store)
    assert checkpoints(disturbed) == checkpoints(undisturbed.store)
    with closing(sqlite3.connect(disturbed / "mlflow.db")) as mlflow:
        assert ("small",) in mlflow.execute("select name from experiments").fetchall()

    again = finish(recipe, disturbed)
    assert again.count(" reused ") == len(recipes.load(str(recipe)).stages)
    assert " running" not in again

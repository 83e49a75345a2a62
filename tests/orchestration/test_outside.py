"""One run among the systems of others: a Ray head that asks for its token, and an MLflow server, with a local store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.store import open_store
from tests.infra.outside import mlflow_server, ray_head
from tests.orchestration.test_kill import RECIPE

TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def pixnerd(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestration.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_on_a_real_head_with_a_real_mlflow_server_ends_registered(tmp_path: Path):
    recipe, home = tmp_path / "small.yaml", tmp_path / "home"
    recipe.write_text(yaml.safe_dump(RECIPE))
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("f" * 64)  # what any use of Ray on this machine left behind
    plain = {name: value for name, value in os.environ.items() if name not in TOKENS} | {"HOME": str(home)}
    with mlflow_server() as server, ray_head(plain) as address:
        run = ["run", str(recipe), "--store", str(tmp_path / "store"), "--on", address, "--json"]
        refused = pixnerd(run, plain)
        assert refused.returncode == 1
        assert "asks for a token" in refused.stderr and "~/.ray/auth_token" in refused.stderr
        assert "RAY_AUTH_MODE=token" in refused.stderr

        done = pixnerd(run, plain | {"RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_URI": server})
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)  # nothing of MLflow's is among it
        registered = told["register"]["output"]

        from mlflow import MlflowClient

        client = MlflowClient(server)
        made = client.get_model_version_by_alias(registered["model"], "champion")
        source = registered["source"]
        assert (str(made.version), made.tags["pixnerd.source"]) == (registered["version"], source)
        store = open_store(str(tmp_path / "store"))
        assert store.exists(source.removeprefix(f"{store.url}/"))
        for stage in ("low", "high", "sft"):
            (found,) = client.search_runs(["1"], f"tags.`pixnerd.digest` = '{told[stage]['digest_of_work']}'")
            assert found.info.status == "FINISHED"
            steps = [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")]
            assert steps == list(range(2, 31, 2))
    assert not (tmp_path / "store" / "mlflow.db").exists()

"""The command as a stranger meets it: help at once, one clear line for a mistake, the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.store import open_store
from training import model as models
from training.encoders import text

COMMANDS = [
    ["run"], ["prepare"], ["train"], ["sample"], ["report"], ["doctor"], ["evaluate", "geneval"],
    ["checkpoint", "show"], ["checkpoint", "import"], ["checkpoint", "export"], ["checkpoint", "fetch"],
    ["data", "show"], ["data", "verify"], ["data", "forget"],
]  # fmt: skip


def pixnerd(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def fails(code: int, *arguments: str | Path, **environment: str) -> str:
    """It fails with this code and says why in one line, which is returned."""
    result = pixnerd(*arguments, **environment)
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_help_answers_within_a_second():
    def took() -> float:
        began = time.perf_counter()
        assert pixnerd("--help").returncode == 0
        return time.perf_counter() - began

    assert min(took() for _ in range(5)) < 1.0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(command: list[str]):
    result = pixnerd(*command, "--help")
    assert result.returncode == 0
    assert f"Example: pixnerd {' '.join(command)}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "demo", "--set", "sft.stepz=3"], "unknown setting `sft.stepz`: did you mean `steps`?"),
        (["run", "demo", "--set", "stf.steps=3"], "did you mean `sft`?"),
        (["run", "demo", "--set", "sft.steps=many"], "`sft.steps`"),
        (["run", "demp"], "there is no recipe `demp`: did you mean `demo`?"),
        (["run", "nowhere/mine.yaml"], "there is no file nowhere/mine.yaml"),
        (["run", "demo", "--store", "ftp://host/x"], "ftp"),
        (["runn"], "Did you mean 'run'?"),
        (["run", "demo", "--sett", "a=b"], "--sett"),
        (["checkpoint", "import", "x", "y", "--network", "best"], "'best' is not one of"),
        (["sample", "x", "p", "--out", "o", "--seeds", "a-b"], "names no seeds"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(arguments: list[str], says: str):
    assert says in fails(2, *arguments)


def test_a_store_that_does_not_answer_is_one_line_and_code_1():
    keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}
    line = fails(1, "run", "demo", "--store", "s3://bucket/x", AWS_ENDPOINT_URL="http://127.0.0.1:9", **keys)
    assert "127.0.0.1:9" in line
    assert "hunter2" not in line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that the command takes for a checkpoint: an untrained network with an encoder of its own."""
    folder = tmp_path / "checkpoint"
    config = models.preset("tiny").model_copy(
        update={"image_size": 16, "hidden": 32, "heads": 2, "blocks": 1, "text_dim": 32, "field_channels": 8}
    )
    models.save(folder, models.PixNerd(config), {"text_encoder": "text"})
    text.build_tiny(folder / "text", ["a red circle"] * 9, hidden=32, layers=1, heads=2, vocab=300)
    return folder


def test_a_checkpoint_is_shown(checkpoint: Path):
    result = pixnerd("checkpoint", "show", checkpoint, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["settings"]["hidden"] == 32
    assert sum(facts["parameters"].values()) == sum(p.numel() for p in models.load(checkpoint).parameters())


def test_a_checkpoint_of_another_shape_is_refused(checkpoint: Path):
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"hidden": 32', '"hidden": 64'))
    assert "instead of" in fails(1, "checkpoint", "show", checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    assert "config.json" in fails(1, "checkpoint", "show", tmp_path)
    assert "config.json" in fails(1, "sample", tmp_path, "a circle", "--out", tmp_path / "out")


def test_debug_shows_the_traceback(tmp_path: Path):
    result = pixnerd("checkpoint", "show", tmp_path, "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path):
    result = pixnerd("run", "demo", "--store", tmp_path / "store", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)
    assert {stage["state"] for stage in stages} == {"new"}
    assert "report" in {stage["stage"] for stage in stages}
    assert not list(open_store(str(tmp_path / "store")).list())


def test_doctor_finds_this_machine_fit():
    result = pixnerd("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert findings["torch"]["ok"]
    assert result.returncode == 0, [f for f in findings.values() if not f["ok"]]

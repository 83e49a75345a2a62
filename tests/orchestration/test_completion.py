"""What the shell offers for a word that has been begun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.completion import recipe_names, setting_paths


def offered(incomplete: str, *arguments: str, **params: Any) -> list[str]:
    return setting_paths(SimpleNamespace(params=params, args=list(arguments)), incomplete)  # type: ignore[arg-type]


def test_recipes_are_offered_by_name():
    assert "demo" in recipe_names("")
    assert recipe_names("de") == ["demo"]
    assert recipe_names("./de") == []


@pytest.mark.parametrize(
    ("incomplete", "told"),
    [
        ("lo", ["low.", "low_data.", "low_dpg.", "low_score."]),
        ("low.objective.", ["low.objective.drop=0.05", "low.objective.repa=0.1", "low.objective.repa_block=2", "..."]),
        ("low.optim.l", ["low.optim.lr=0.002"]),
        ("train.op", ["train.optim.betas=", "train.optim.final=", "train.optim.lr=", "..."]),
        ("gate.r", ["gate.rules="]),
        ("low.optim.zzz", []),
    ],
)
def test_settings_are_offered_part_by_part_with_their_values(incomplete: str, told: list[str]):
    found = offered(incomplete, workflow="demo")
    assert found == told or (told[-1] == "..." and found[: len(told) - 1] == told[:-1])


def test_the_recipe_is_found_in_a_line_that_cannot_be_read_yet():
    assert offered("lo", "demo") == ["low.", "low_data.", "low_dpg.", "low_score."]
    assert offered("lo", config=None) == []
    assert offered("lo", "no_such_recipe") == []


def test_a_recipe_with_a_mistake_in_it_offers_nothing_and_prints_nothing(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("name: [")
    assert offered("a", str(tmp_path / "x.yaml")) == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="it is bash that asks")
def test_bash_completes_the_line(tmp_path: Path):
    command = tmp_path / "pixnerd"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m orchestration.cli "$@"\n')
    command.chmod(0o755)
    asked = """
        eval "$(_PIXNERD_COMPLETE=source_bash pixnerd)"
        COMP_WORDS=(pixnerd run demo --set low.st) COMP_CWORD=4
        _pixnerd_completion pixnerd
        echo "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert (result.stdout, result.stderr) == ("low.steps=500\n", "")

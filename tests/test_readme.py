"""What the README tells people to type is understood, and works in the order in which it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from orchestration.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[list[str]]:
    """The indented blocks of commands, line by line."""
    return [block.strip("\n").splitlines() for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]


LINES = [line.strip() for block in blocks(README) for line in block]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("pixnerd ")])
def test_every_line_is_one_that_the_command_understands(line: str):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = command.make_context("pixnerd", words)
    while isinstance(command, typer.core.TyperGroup):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)  # type: ignore[assignment]
        context = command.make_context(name, rest, parent=context)


def test_every_target_is_there():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {shlex.split(line, comments=True)[1] for line in LINES if line.startswith("make ")}
    assert named
    assert named <= targets


def test_every_command_that_the_text_names_is_one():
    groups = typer.main.get_command(app)
    for said in re.findall(r"`pixnerd ([^`]+)`", README):
        command, words = groups, said.split()
        while isinstance(command, typer.core.TyperGroup) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, said
            command = command.commands[words.pop(0)]  # type: ignore[assignment]


@pytest.mark.slow
def test_the_commands_work_in_order(tmp_path: Path):
    """On a recipe as the demo's, but small: what is typed is the same, and `demo` means that one."""
    small = {
        "name": "demo",
        "extends": "demo",
        "defaults": {
            "train": {"log_every": 2, "save_every": 2},
            "evaluate": {"per_task": 2, "images": 1, "sampling": {"steps": 2}},
        },
        "stages": {
            "corpus": {"count": 400},
            "prepare": {"rows_per_shard": 200},
            **{name: {"steps": 4} for name in ("low", "high", "sft")},
            "gate": {"rules": [{"at_least": 0.0}]},
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    command = tmp_path / "bin" / "pixnerd"
    command.parent.mkdir()
    command.write_text(
        f"""#!{sys.executable}
import sys
from orchestration.cli import main
sys.argv = [{str(tmp_path / "small.yaml")!r} if word == "demo" else word for word in sys.argv]
main()
"""
    )
    command.chmod(0o755)
    [block] = [block for block in blocks(README) if "pixnerd run demo --store runs/demo" in block[0]]
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    (tmp_path / "withdrawn.txt").write_text("images/000002.jpg\n")
    for line in [*block, *(line for line in LINES if line.startswith("pixnerd data forget"))]:
        result = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    made = {"pictures", "large", "scores", "data-pictures", "page.html", "champion"}
    assert made <= {path.name for path in tmp_path.iterdir()}

"""What the README tells people to type is understood, and works in the order in which it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

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
            command = command.commands[words.pop(0)]

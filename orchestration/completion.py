"""What a shell offers for a word that has been begun. It answers at once, so nothing heavy is imported here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import typer

from infra.errors import PixnerdError

_PLAIN = re.compile(r"[\w./+:,-]*")  # what a shell leaves as it is
_WORKFLOW = ("workflow", "config", "recipe")  # what the commands call their recipe


def recipe_names(incomplete: str) -> list[str]:
    """Of a path, the shell knows more."""
    from pipelines.recipes import names

    return [name for name in names() if name.startswith(incomplete)]


def setting_paths(context: typer.Context, incomplete: str) -> list[str]:
    """What the recipe that was named sets: its stages and their settings, as far as a point was typed."""
    from pipelines.recipes import load

    # As long as the word is not there the line cannot be read, and what stands in it lies among the arguments.
    given = [context.params.get(key) for key in _WORKFLOW] + list(context.args)
    name = next((str(value) for value in given if value), "")
    found: set[str] = set()
    with suppress(PixnerdError):
        stages = load(name).stages
        kinds = {str(stage.get("kind")): stage for stage in stages.values()}
        several = {path.partition("=")[0] + "=" for path in _paths(kinds)}  # whose stages may differ
        found = set(_paths(stages)) | {path for path in several if path.partition(".")[0] not in stages}
    depth = incomplete.count(".") + 1
    fitting = [path for path in found if path.startswith(incomplete)]
    offered = {_as_far_as(path, depth) for path in fitting}
    while len(offered) == 1 and min(offered).endswith("."):  # the shell would end the word there
        depth += 1
        offered = {_as_far_as(path, depth) for path in fitting}
    return sorted(offered)


def _paths(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Each setting with its value."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{above}{name}.")
        elif above and name != "kind":
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            yield f"{above}{name}={text if _PLAIN.fullmatch(text) else ''}"


def _as_far_as(path: str, depth: int) -> str:
    parts = path.partition("=")[0].split(".")
    return path if len(parts) <= depth else ".".join(parts[:depth]) + "."

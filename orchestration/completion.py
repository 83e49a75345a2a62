"""Shell completion of recipe names and settings. It must answer at once, so nothing heavy is imported here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import typer

from infra.errors import PixnerdError

_PLAIN = re.compile(r"[\w./+:,-]*")  # a value that needs no quotes in a shell
_RECIPE_ARGUMENTS = ("workflow", "config", "recipe")  # the names of the commands' recipe argument


def recipe_names(incomplete: str) -> list[str]:
    """Names only: the shell itself completes paths of recipe files."""
    from pipelines.recipes import names

    return [name for name in names() if name.startswith(incomplete)]


def setting_paths(context: typer.Context, incomplete: str) -> list[str]:
    """The recipe's settings that begin so, up to the next point: `low.` for `lo`, `low.optim.` for `low.op`."""
    from pipelines.recipes import load

    # While the word is incomplete the line does not parse, and the recipe may stand among the unparsed arguments.
    candidates = [context.params.get(key) for key in _RECIPE_ARGUMENTS] + list(context.args)
    name = next((str(value) for value in candidates if value), "")
    paths: set[str] = set()
    with suppress(PixnerdError):
        stages = load(name).stages
        kinds = {str(stage.get("kind")): stage for stage in stages.values()}
        of_kinds = {path.partition("=")[0] + "=" for path in _paths(kinds)}  # no value: stages of a kind may differ
        paths = set(_paths(stages)) | {path for path in of_kinds if path.partition(".")[0] not in stages}
    depth = incomplete.count(".") + 1
    fitting = [path for path in paths if path.startswith(incomplete)]
    offered = {_as_far_as(path, depth) for path in fitting}
    while len(offered) == 1 and min(offered).endswith("."):  # the shell would end the word at that point
        depth += 1
        offered = {_as_far_as(path, depth) for path in fitting}
    return sorted(offered)


def _paths(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Each setting with its value: `low.optim.lr=0.001`."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _paths(value, f"{above}{name}.")
        elif above and name != "kind":
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            yield f"{above}{name}={text if _PLAIN.fullmatch(text) else ''}"


def _as_far_as(path: str, depth: int) -> str:
    parts = path.partition("=")[0].split(".")
    return path if len(parts) <= depth else ".".join(parts[:depth]) + "."

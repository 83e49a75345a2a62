"""`pixnerd settings`: list what may be set."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from orchestration.options import JsonOption
from orchestration.terminal import print_json

WIDTH = 100

app = typer.Typer()


@app.command(epilog="Example: pixnerd settings train")
def settings(
    kind: Annotated[
        str | None,
        typer.Argument(help="A kind of stage: prepare, train, evaluate, ... [default: list the kinds]"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """List every setting of a kind of stage: its type, its default, its meaning, and whether it changes results."""
    from pipelines.stages.reference import KNOWN, about, settings_of

    if kind is None:
        kinds = {name: about(name) for name in KNOWN}
        if json_:
            print_json(kinds)
        else:
            print("\n".join(f"{name:<10} {line}" for name, line in kinds.items()))
        return
    listed = settings_of(kind)
    if json_:
        print_json([setting._asdict() for setting in listed])
        return
    for setting in listed:
        default = f" [{setting.default}]" if setting.default else " (must be given)"
        kept = "" if setting.counts else "; what was made stays when it changes"
        print(f"{setting.name}: {setting.type}{default}{kept}")
        if setting.meaning:
            print(textwrap.indent(textwrap.fill(setting.meaning, WIDTH), "    "))

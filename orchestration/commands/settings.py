"""`pixnerd settings`: what may be set, for a terminal."""

from __future__ import annotations

import textwrap

from orchestration.terminal import print_json
from pipelines.stages.kinds import KINDS
from pipelines.stages.reference import about, settings_of

WIDTH = 100


def show_settings(kind: str | None, *, as_json: bool) -> None:
    if kind is None:
        told = {name: about(name) for name in KINDS}
        if as_json:
            print_json(told)
        else:
            print("\n".join(f"{name:<10} {line}" for name, line in told.items()))
        return
    found = settings_of(kind)
    if as_json:
        print_json([setting._asdict() for setting in found])
        return
    for setting in found:
        default = f" [{setting.default}]" if setting.default else " (must be given)"
        kept = "" if setting.counts else "; what was made stays when it changes"
        print(f"{setting.name}: {setting.type}{default}{kept}")
        if setting.meaning:
            print(textwrap.indent(textwrap.fill(setting.meaning, WIDTH), "    "))

"""The section of settings that change results, folded up stage by stage, and of the versions of what ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipelines.page.elements import duration, section, short, swatch, table
from pipelines.page.markup import Child, Html, tag
from pipelines.page.story import Story


def section_of(story: Story) -> Html:
    about = "What results depend on. A stage's digest is made of its settings and its inputs, and names its work."
    stages = [_stage(story, k) for k in range(len(story.stages))]
    return section("Settings and versions", about, stages, _versions(story))


def _stage(story: Story, number: int) -> Html:
    stage, earlier = story.stages[number], story.inputs(number)
    about = tag("small", f"{stage.kind}, {duration(stage.seconds)}, {stage.started}")
    summary = tag("summary", swatch(story, number, stage.stage), about, short(stage.digest_of_work))
    rows: list[list[Child]] = []
    for name, digest in stage.inputs.items():
        target = story.stages[earlier[name]].stage if name in earlier else "a stage that is not on this page"
        rows.append([name, [target, " ", short(digest)]])
    rows += [[name, tag("code", value)] for name, value in _flat(stage.settings)]
    return tag("details", summary, table([], rows, "settings"), id=f"stage-{number}")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs of path and value: ("sources.0.kind", "url_list")."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        inner = list(enumerate(value))
    for key, part in inner:
        yield from _flat(part, f"{path}.{key}" if path else str(key))
    if path and not inner:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(story: Story) -> Html:
    """Each set of versions once, with the stages that ran with it."""
    sets: dict[str, list[str]] = {}
    for stage in story.stages:
        sets.setdefault(_listed(stage.versions), []).append(stage.stage)
    for number, summary in story.prepared.items():
        for versions in summary.versions:
            sets.setdefault(_listed(versions), []).append(f"decoders of {story.stages[number].stage}")
    every = [stage.stage for stage in story.stages]
    body = [["all stages" if names == every else ", ".join(names), versions] for versions, names in sets.items()]
    return tag("div", tag("h3", "Versions"), table([], body, "settings"))


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))

"""Recipes: a workflow written down as data, read top to bottom.

    name: demo
    extends: other            # optional: start from another recipe and change what is named here
    defaults:                 # optional: settings that every stage of a kind starts from
      train: {batch: 64}
    stages:
      low: {kind: train, data: low_data, steps: 300}

A recipe is named by its file's name here, or by a path. `--set low.steps=100` changes a stage, `--set
defaults.train.batch=32` all stages of a kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra.config import Settings, load_yaml, nearest, override, parse
from infra.errors import SettingsError

HERE = Path(__file__).parent


class Recipe(Settings):
    name: str
    about: str = ""
    stages: dict[str, dict[str, Any]]


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load(name: str, assignments: Iterable[str] = ()) -> Recipe:
    data = _read(name, seen=())
    for assignment in assignments:
        data = override(data, [_full_path(assignment, data)])
    defaults = data.pop("defaults", {})
    stages = data.get("stages")
    if isinstance(stages, dict) and isinstance(defaults, dict):
        data["stages"] = {k: merge(defaults.get(_kind(v), {}), v) for k, v in stages.items()}
        if unused := defaults.keys() - {_kind(v) for v in stages.values()}:
            raise SettingsError(
                f"defaults are given for `{sorted(unused)[0]}`, but no stage is of that kind",
                remedy="correct the kind's name, or take the lines out",
            )
    return parse(Recipe, data)


def merge(base: Any, change: Any) -> Any:
    """`change` over `base`: mappings are merged key by key, everything else is replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {k: merge(base[k], change[k]) if k in base and k in change else change.get(k, base.get(k))
                for k in [*base, *(k for k in change if k not in base)]}  # fmt: skip
    return change


def find(name: str) -> Path:
    path = HERE / f"{name}.yaml"
    if path.exists():
        return path
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    near = nearest(name, names())
    raise SettingsError(
        f"there is no recipe `{name}`",
        remedy=f"did you mean `{near}`?" if near else f"known: {', '.join(names())}; or give a path to a .yaml file",
    )


def _read(name: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = find(name)
    if path in seen:
        raise SettingsError(f"the recipe {path.name} extends itself", remedy="break the circle of `extends`")
    data = load_yaml(path)
    base = data.pop("extends", None)
    return data if base is None else merge(_read(str(base), (*seen, path)), data)


def _kind(stage: Any) -> str:
    return str(stage.get("kind", "")) if isinstance(stage, dict) else ""


def _full_path(assignment: str, data: dict[str, Any]) -> str:
    """A stage's name may stand first: `low.steps=1` is `stages.low.steps=1`."""
    first = assignment.partition("=")[0].split(".")[0].strip()
    stages = data.get("stages", {})
    if first in stages:
        return f"stages.{assignment}"
    if first in ("stages", "defaults", "name", "about"):
        return assignment
    near = nearest(first, [*stages, "defaults"])
    raise SettingsError(
        f"unknown setting `{assignment.partition('=')[0]}`",
        remedy=f"did you mean `{near}`?" if near else f"its first part is a stage: {', '.join(stages)}",
    )

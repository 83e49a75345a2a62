"""Recipes: a workflow written down as data, read top to bottom.

    name: demo
    extends: other            # optional: start from another recipe and change what is named here
    defaults:                 # optional: settings that every stage of a kind starts from
      train: {batch: 64}
    stages:
      low: {kind: train, data: low_data, steps: 300}

A recipe is named by its file's name here, or by a path. `--set low.steps=100` changes a stage; `--set train.steps=100`,
where no stage has that name, every stage of the kind; `--set defaults.train.batch=32` what they start from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from infra.config import Settings, nearest, parse, spelt
from infra.errors import SettingsError
from infra.written import load_yaml, override

HERE = Path(__file__).parent
KEYS = ("name", "about", "extends", "defaults", "stages")

# It becomes a folder (runs/NAME) and the name of a run; a stage's stands in paths of settings, where a point parts it.
RecipeName = Annotated[
    str, spelt(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "at most 100 letters, digits, `_`, `.` and `-`, no mark first")
]
StageName = Annotated[
    str, spelt(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", "at most 100 letters, digits, `_` and `-`, no `-` first")
]


class Recipe(Settings):
    name: RecipeName
    about: str = ""
    stages: dict[StageName, dict[str, Any]] = Field(min_length=1)
    # They are in the stages already; here they tell where a setting was written.
    defaults: dict[str, dict[str, Any]] = Field({}, exclude=True, repr=False)


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load(name: str, assignments: Iterable[str] = ()) -> Recipe:
    data = _read(name, seen=())
    if unknown := [str(key) for key in data if key not in KEYS]:
        near = nearest(unknown[0], KEYS)
        raise SettingsError(
            f"unknown setting `{unknown[0]}`",
            remedy=f"did you mean `{near}`?" if near else f"known here: {', '.join(KEYS)}",
        )
    for assignment in assignments:
        data = override(data, _full(assignment, data))
        _check_effect(assignment, data)
    data = {**data, "defaults": data.get("defaults") or {}}
    recipe = parse(Recipe, data)
    kinds = {_kind(stage) for stage in recipe.stages.values()}
    if unused := sorted(recipe.defaults.keys() - kinds):
        near = nearest(unused[0], kinds)
        raise SettingsError(
            f"defaults are given for `{unused[0]}`, but no stage is of that kind",
            remedy=f"did you mean `{near}`?" if near else "correct the kind's name, or take the lines out",
        )
    stages = {name: merge(recipe.defaults.get(_kind(stage), {}), stage) for name, stage in recipe.stages.items()}
    return recipe.model_copy(update={"stages": stages})


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


def _full(assignment: str, data: dict[str, Any]) -> list[str]:
    """The assignment with whole paths: a stage's name may stand first, or a kind's, which means all of its stages."""
    path, equals, _ = assignment.partition("=")
    first = path.split(".")[0].strip()
    stages = data.get("stages")
    kinds = {name: _kind(stage) for name, stage in stages.items()} if isinstance(stages, dict) else {}
    if first in KEYS or not equals:
        return [assignment]
    if first in kinds:
        return [f"stages.{assignment.strip()}"]
    if first in kinds.values():
        return [f"stages.{name}{assignment.strip()[len(first) :]}" for name, kind in kinds.items() if kind == first]
    near = nearest(first, [*kinds, *kinds.values(), *KEYS])
    raise SettingsError(
        f"unknown setting `{path.strip()}`",
        remedy=f"did you mean `{near}`?" if near else f"its first part is a stage: {', '.join(map(str, kinds))}",
    )


def _check_effect(assignment: str, data: dict[str, Any]) -> None:
    """A default that every stage of its kind overrides changes nothing, and looks as if it did."""
    first, *path = assignment.partition("=")[0].strip().split(".")
    if first != "defaults" or len(path) < 2:
        return
    kind, *path = path
    given = _at(data["defaults"], [kind, *path])
    own = {name: stage for name, stage in data["stages"].items() if _kind(stage) == kind}
    if own and all(_at(stage, leaf) is not None for stage in own.values() for leaf in _leaves(given, path)):
        raise SettingsError(
            f"`--set {assignment}` changes nothing: {', '.join(own)} say it for themselves",
            remedy=f"write --set {assignment.strip().removeprefix('defaults.')} to change them all",
        )


def _at(data: Any, path: Iterable[str]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _leaves(value: Any, path: list[str]) -> Iterator[list[str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, [*path, key])
    else:
        yield path

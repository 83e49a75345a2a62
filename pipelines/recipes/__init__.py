"""Recipes: a workflow written down as data, read top to bottom.

    name: demo
    extends: other            # optional: start from another recipe and change what is named here
    defaults:                 # optional: settings that every stage of a kind starts from
      train: {batch: 64}
    stages:
      low: {kind: train, data: low_data, steps: 300}
    store: {endpoint_url: "http://10.0.0.1:9000"}   # optional, like `cluster` and `tracking`: how to reach services

A recipe is named by its file's name in this folder, or by a path. `--set low.steps=100` changes one stage;
`--set train.steps=100`, where no stage is called `train`, every stage of that kind; `--set defaults.train.batch=32` the
default that stages of the kind start from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from infra.cluster import ClusterSettings
from infra.config import Name, Settings, parse, spelt
from infra.errors import Fault, SettingsError
from infra.problems import did_you_mean, settings_error
from infra.store import StoreSettings
from infra.tracking import TrackingSettings
from infra.yaml_settings import lines_of, load_yaml, override

HERE = Path(__file__).parent
KEYS = ("name", "about", "extends", "defaults", "stages", "store", "cluster", "tracking")

# It may hold no point, as points separate the parts of a setting's path.
StageName = Annotated[
    str, spelt(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", "at most 100 letters, digits, `_` and `-`, no `-` first")
]


class Recipe(Settings):
    name: Name  # of a folder (runs/NAME) and an MLflow run
    about: str = ""
    stages: dict[StageName, dict[str, Any]] = Field(min_length=1)
    store: StoreSettings = StoreSettings()
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()
    # The stages contain them already; they are kept to tell in which line a setting was written.
    defaults: dict[str, dict[str, Any]] = Field({}, exclude=True, repr=False)
    lines: dict[str, str] = Field({}, exclude=True, repr=False)  # stages.train.steps -> mine.yaml:12

    def refused(self, faults: Sequence[Fault]) -> SettingsError:
        """One error of all faults, each with the line of the recipe that it is in."""
        return _refused(self.name, self.lines, faults)


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load(name: str, assignments: Iterable[str] = ()) -> Recipe:
    lines: dict[str, str] = {}
    data = _read(name, lines, seen=())
    faults = list(_unknown_keys(data))
    for assignment in assignments:
        full = _full_paths(assignment, data)
        data = override(data, full)
        _check_effect(assignment, data)
        for path in (each.partition("=")[0].strip() for each in full):
            # Lines that set something below this path are no longer where those values come from.
            lines = {other: line for other, line in lines.items() if not other.startswith(f"{path}.")}
            lines[path] = "--set"
    known = {key: value for key, value in data.items() if key in KEYS} | {"defaults": data.get("defaults") or {}}
    try:
        recipe = parse(Recipe, known)
    except SettingsError as error:
        raise _refused(name, lines, [*faults, *error.faults]) from None
    if faults := [*faults, *_unused_defaults(recipe)]:
        raise _refused(name, lines, faults)
    stages = {name: merge(recipe.defaults.get(_kind(stage), {}), stage) for name, stage in recipe.stages.items()}
    return recipe.model_copy(update={"stages": stages, "lines": lines})


def _unknown_keys(data: Mapping[Any, Any]) -> Iterator[Fault]:
    for key in map(str, data.keys() - set(KEYS)):
        remedy = did_you_mean(key, KEYS, f"known here: {', '.join(KEYS)}")
        yield Fault(key, f"unknown setting `{key}`", remedy)


def _unused_defaults(recipe: Recipe) -> Iterator[Fault]:
    kinds = {_kind(stage) for stage in recipe.stages.values()}
    for kind in sorted(recipe.defaults.keys() - kinds):
        remedy = did_you_mean(kind, kinds, "correct the kind's name, or take the lines out")
        yield Fault(f"defaults.{kind}", f"defaults are given for `{kind}`, but no stage is of that kind", remedy)


def _refused(name: str, lines: Mapping[str, str], faults: Iterable[Fault]) -> SettingsError:
    """The faults in the order of their lines; each once, though every stage that has a faulty default reports it."""
    ordered = sorted(dict.fromkeys(faults), key=lambda fault: _order(_place(fault.path, lines)))
    placed = [fault._replace(message=f"{_place(fault.path, lines)}{fault.message}") for fault in ordered]
    if len(placed) == 1:
        return settings_error(placed)
    listed = [f"  {message}: {remedy}" if remedy else f"  {message}" for _, message, remedy in placed]
    return SettingsError(
        f"there are {len(placed)} mistakes in the recipe `{name}`",
        remedy="\n".join(["correct them and run again", *listed]),
        faults=placed,
    )


def _place(path: str, lines: Mapping[str, str]) -> str:
    """`mine.yaml:12: `, the line of the setting or of the closest one around it; empty for a default of the code."""
    path = path if path.partition(".")[0] in KEYS else f"stages.{path}"
    while path and path not in lines:
        path = path.rpartition(".")[0]
    return f"{lines[path]}: " if path else ""


def _order(place: str) -> tuple[str, int]:
    file, _, line = place.removesuffix(": ").rpartition(":")
    return file, int(line) if line.isdecimal() else 0


def merge(base: Any, change: Any) -> Any:
    """`change` over `base`: mappings are merged key by key, everything else is replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        return base | {key: merge(base.get(key), value) for key, value in change.items()}
    return change


def find(name: str) -> Path:
    path = HERE / f"{name}.yaml"
    if path.exists():
        return path
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    remedy = did_you_mean(name, names(), f"known: {', '.join(names())}; or give a path to a .yaml file")
    raise SettingsError(f"there is no recipe `{name}`", remedy=remedy)


def _read(name: str, lines: dict[str, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe merged over the one that it extends. `lines` is filled with the line of every setting."""
    path = find(name)
    if path in seen:
        raise SettingsError(f"the recipe {path.name} extends itself", remedy="break the circle of `extends`")
    data = load_yaml(path)
    extended = data.pop("extends", None)
    base = {} if extended is None else _read(str(extended), lines, (*seen, path))
    lines |= {setting: f"{path.name}:{line}" for setting, line in lines_of(path).items()}
    return data if extended is None else merge(base, data)


def _kind(stage: Any) -> str:
    return str(stage.get("kind", "")) if isinstance(stage, dict) else ""


def _full_paths(assignment: str, data: dict[str, Any]) -> list[str]:
    """The assignment with full paths; it may begin with a stage's name, or with a kind, for all stages of the kind.

    `train.steps=9` becomes `stages.low.steps=9` and `stages.high.steps=9`.
    """
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
    known, otherwise = [*kinds, *kinds.values(), *KEYS], f"its first part is a stage: {', '.join(map(str, kinds))}"
    raise SettingsError(f"unknown setting `{path.strip()}`", remedy=did_you_mean(first, known, otherwise))


def _check_effect(assignment: str, data: dict[str, Any]) -> None:
    """Refuse to set a default that every stage of its kind overrides: it would change nothing."""
    first, *path = assignment.partition("=")[0].strip().split(".")
    if first != "defaults" or len(path) < 2:
        return
    default = _at(data["defaults"], path)
    kind, *path = path
    stages = {name: stage for name, stage in data["stages"].items() if _kind(stage) == kind}
    if stages and all(_at(stage, leaf) is not None for stage in stages.values() for leaf in _leaves(default, path)):
        raise SettingsError(
            f"`--set {assignment}` changes nothing: {', '.join(stages)} say it for themselves",
            remedy=f"write --set {assignment.strip().removeprefix('defaults.')} to change them all",
        )


def _at(data: Any, path: Iterable[str]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _leaves(value: Any, path: list[str]) -> Iterator[list[str]]:
    """The paths of all values inside of nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, [*path, key])
    else:
        yield path

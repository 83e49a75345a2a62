"""A recipe's stages as kinds and settings: all that is wrong with them and between them is told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from infra.config import Settings, parse
from infra.errors import Fault, SettingsError
from infra.problems import Wrong, did_you_mean, settings_error, shown, where
from pipelines.recipes import Recipe
from pipelines.stages.base import StageKind
from pipelines.stages.kinds import KINDS

Parsed = Mapping[str, tuple[StageKind, Settings]]


def parse_stages(recipe: Recipe) -> Parsed:
    """Each stage's kind and settings; one error tells all that is wrong with them and between them."""
    parsed: dict[str, tuple[StageKind, Settings]] = {}
    faults: list[Fault] = []
    for name, data in recipe.stages.items():
        try:
            parsed[name] = parse_stage(name, data, recipe.defaults)
        except SettingsError as error:
            faults += error.faults or [Fault(name, error.message, error.remedy)]
    for name in parsed:
        faults += _misfits(name, recipe, parsed)
    if faults:
        raise recipe.refused(faults)
    _refuse_circles(recipe, parsed)
    return parsed


def _refuse_circles(recipe: Recipe, parsed: Parsed) -> None:
    fine: set[str] = set()

    def visit(name: str, readers: tuple[str, ...]) -> None:
        if name in readers:
            circle = f"the stages {' -> '.join([*readers, name])} wait for each other"
            raise recipe.refused([Fault(name, circle, "break the circle")])
        if name not in fine:
            for target in inputs_of(name, parsed).values():
                visit(target, (*readers, name))
            fine.add(name)

    for name in parsed:
        visit(name, ())


def inputs_of(name: str, parsed: Parsed) -> dict[str, str]:
    kind, settings = parsed[name]
    return {n: n for n in parsed if n != name} if kind.reads_all else kind.references(settings)


def _misfits(name: str, recipe: Recipe, parsed: Parsed) -> Iterator[Fault]:
    """What is wrong between a stage and those that it reads, as far as the settings of all of them are valid."""
    (kind, settings), inputs = parsed[name], inputs_of(name, parsed)
    for field, target in inputs.items():
        if target not in recipe.stages:
            remedy = did_you_mean(target, recipe.stages, f"its stages: {', '.join(recipe.stages)}")
            path = f"{name}.{field}"
            yield Fault(path, f"`{path}` names the stage `{target}`, which the recipe does not have", remedy)
    if not all(target in parsed for target in inputs.values()):
        return
    input_settings = {field: parsed[target][1] for field, target in inputs.items()}
    for wrong in list(_other_kinds(kind, parsed, inputs)) or kind.check(settings, input_settings):
        steps = tuple(int(part) if part.isdecimal() else part for part in wrong.field.split("."))
        written = {name: recipe.stages[name], f"defaults.{kind.name}": recipe.defaults.get(kind.name, {})}
        path = where(steps, recipe.stages[name], written)
        yield Fault(path, f"`{path}` {wrong.message}", wrong.remedy)


def _other_kinds(kind: StageKind, parsed: Parsed, inputs: Mapping[str, str]) -> Iterator[Wrong]:
    """What is wrong where a setting names a stage of another kind than it needs."""
    for field, target in inputs.items():
        taken = kind.takes.get(field.partition(".")[0])
        needed = (taken,) if isinstance(taken, str) else taken
        if needed is not None and parsed[target][0].name not in needed:
            fitting = [name for name, (other, _) in parsed.items() if other.name in needed]
            yield Wrong(
                field,
                f"names `{target}`, whose kind is {parsed[target][0].name}, not {' or '.join(needed)}",
                f"name {' or '.join(fitting)}" if fitting else f"add a stage of the kind {' or '.join(needed)}",
            )


def parse_stage(
    name: str, data: dict[str, Any], defaults: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> tuple[StageKind, Settings]:
    """`defaults`: the recipe's, by kind. `data` contains them; errors use them to tell where a value was written."""
    kind = KINDS.get(str(data.get("kind")))
    if kind is None:
        path, wrong = f"{name}.kind", data.get("kind")
        remedy = did_you_mean(str(wrong), KINDS, f"known: {', '.join(KINDS)}")
        raise settings_error([Fault(path, f"`{path}` is {shown(wrong)}, which is not a kind of stage", remedy)])
    settings = {k: v for k, v in data.items() if k != "kind"}
    return kind, parse(
        kind.settings, settings, where=name, shared={f"defaults.{kind.name}": defaults.get(kind.name, {})}
    )

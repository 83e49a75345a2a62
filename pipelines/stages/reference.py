"""Every setting that a recipe may hold, read from the classes: for `pixnerd settings` and SETTINGS.md."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from infra.cluster import ClusterSettings
from infra.config import Secret, Settings, changes_results
from infra.errors import SettingsError
from infra.problems import did_you_mean
from infra.store import StoreSettings
from infra.tracking import TrackingSettings
from pipelines.stages.kinds import KINDS

PAGE = Path(__file__).parents[1] / "SETTINGS.md"
_NAMES = {str: "text", int: "number", float: "number", bool: "true or false", dict: "mapping", Path: "path"}


class Setting(NamedTuple):
    name: str  # its path within the stage: `optim.lr`
    type: str
    default: str  # as YAML writes it; empty if the setting must be given
    meaning: str
    counts: bool  # whether it changes results


# Sections that a recipe may hold beside its stages -> what each is for, and its class.
BESIDE: dict[str, tuple[str, type[Settings]]] = {
    "store": ("How the store is reached; what is not set comes from the AWS_* variables and files.", StoreSettings),
    "cluster": ("The Ray cluster that does the work; `--on` names another one.", ClusterSettings),
    "tracking": ("Where MLflow keeps the figures.", TrackingSettings),
}
KNOWN = (*KINDS, *BESIDE)


def about(kind: str) -> str:
    """One line on what a stage of the kind does: the first of its function's docstring."""
    return BESIDE[kind][0] if kind in BESIDE else (KINDS[kind].work.__doc__ or "").strip().splitlines()[0]


def settings_of(kind: str) -> list[Setting]:
    """The settings of a kind of stage, or of a section beside them, each followed by the settings nested in it."""
    if kind not in KNOWN:
        remedy = did_you_mean(kind, KNOWN, f"kinds: {', '.join(KNOWN)}")
        raise SettingsError(f"there is no kind of stage `{kind}`", remedy=remedy)
    return list(_settings(BESIDE[kind][1] if kind in BESIDE else KINDS[kind].settings, "", True))


def page() -> str:
    """SETTINGS.md: a table for each kind of stage."""
    lines = [
        "# Settings",
        "",
        "Made by `python -m pipelines.stages.reference` from the classes that read them; `pixnerd settings KIND` "
        "prints the same.",
        "A setting marked with = changes no result, so changing it makes nothing anew: it is about speed alone, or "
        "says where something lies whose content counts.",
    ]
    for name in KNOWN:
        lines += ["", f"## {name}", "", about(name), ""]
        lines += ["| Setting | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(setting) for setting in settings_of(name)]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    default = f"`{setting.default}`" if setting.default else "must be given"
    cells = [f"`{setting.name}`{'' if setting.counts else ' ='}", setting.type, default, setting.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _settings(cls: type[Settings], prefix: str, counts: bool) -> Iterator[Setting]:
    """`counts`: whether the setting that holds these changes results; only then can they."""
    for name, field in cls.model_fields.items():
        path, field_counts = f"{prefix}{name}", counts and changes_results(field)
        nested = list(_classes(field.annotation))
        yield Setting(path, _or(_types(field.annotation)), _default(field), field.description or "", field_counts)
        is_list = get_origin(_bare(field.annotation)) is list
        for inner in nested:
            key = f"{path}[{_kind_of(inner)}]." if len(nested) > 1 else f"{path}[]." if is_list else f"{path}."
            yield from _settings(inner, key, field_counts)


def _kind_of(cls: type[Settings]) -> str:
    field = cls.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field is not None else cls.__name__


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; without `Annotated`, which only says how values are checked."""
    annotation = _bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _classes(annotation: Any) -> Iterator[type[Settings]]:
    """The Settings classes that a field may hold, also as items of a list."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Settings):
            yield member
        elif get_origin(member) in (list, tuple):
            yield from _classes(get_args(member)[0])


def _types(annotation: Any) -> Iterator[str]:
    """The types that a field may have, as a reader of YAML calls them."""
    for member in _members(annotation):
        origin, inner = get_origin(member), get_args(member)
        if member is type(None):
            yield "none"
        elif origin is Literal:
            yield from (value if isinstance(value, str) else json.dumps(value) for value in inner)
        elif origin in (list, tuple):
            yield f"list of {_or(_types(inner[0]))}"
        elif isinstance(member, type) and issubclass(member, Settings):
            yield "settings"
        elif member is Secret:
            yield "env:NAME or file:PATH"
        else:
            yield _NAMES.get(origin or member, "value")


def _or(names: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(names))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        return "{}"
    return "none" if value is None else json.dumps(value, default=str, ensure_ascii=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

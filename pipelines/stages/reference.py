"""Every setting that a recipe may hold, told from the classes themselves: for `pixnerd settings` and SETTINGS.md."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from infra.cluster import ClusterSettings
from infra.config import Secret, Settings, changes_results
from infra.errors import SettingsError
from infra.problems import nearest
from infra.store import StoreSettings
from infra.tracking import TrackingSettings
from pipelines.stages.kinds import KINDS

PAGE = Path(__file__).parents[1] / "SETTINGS.md"
_NAMES = {str: "text", int: "number", float: "number", bool: "true or false", dict: "mapping", Path: "path"}


class Setting(NamedTuple):
    name: str  # with those above it: `optim.lr`
    type: str
    default: str  # as YAML would have it; empty where it must be given
    meaning: str
    counts: bool  # whether it changes results


# What stands beside the stages in a recipe.
BESIDE: dict[str, tuple[str, type[Settings]]] = {
    "store": ("How the store is reached; what is not set comes from the AWS_* variables and files.", StoreSettings),
    "cluster": ("The Ray cluster that does the work; `--on` names another one.", ClusterSettings),
    "tracking": ("Where MLflow keeps the figures.", TrackingSettings),
}
KNOWN = (*KINDS, *BESIDE)


def about(kind: str) -> str:
    """What a stage of the kind does, in a line."""
    return BESIDE[kind][0] if kind in BESIDE else (KINDS[kind].work.__doc__ or "").strip().splitlines()[0]


def settings_of(kind: str) -> list[Setting]:
    """The settings of a kind of stage, or of what stands beside them, each followed by the settings inside of it."""
    if kind not in KNOWN:
        near = nearest(kind, KNOWN)
        raise SettingsError(
            f"there is no kind of stage `{kind}`",
            remedy=f"did you mean `{near}`?" if near else f"kinds: {', '.join(KNOWN)}",
        )
    return list(_settings(BESIDE[kind][1] if kind in BESIDE else KINDS[kind].settings, "", True))


def page() -> str:
    """All kinds as one page."""
    parts = [
        "# Settings",
        "",
        "Made by `python -m pipelines.stages.reference` from the classes that read them; `pixnerd settings KIND` "
        "prints the same.",
        "What was made stays when a setting marked with = changes: it is of speed alone, or says where something lies "
        "whose content counts.",
    ]
    for name in KNOWN:
        parts += ["", f"## {name}", "", about(name), ""]
        parts += ["| Setting | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        parts += [_row(setting) for setting in settings_of(name)]
    return "\n".join(parts) + "\n"


def _row(setting: Setting) -> str:
    default = f"`{setting.default}`" if setting.default else "must be given"
    cells = [f"`{setting.name}`{'' if setting.counts else ' ='}", setting.type, default, setting.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _settings(cls: type[Settings], above: str, counts: bool) -> Iterator[Setting]:
    for name, field in cls.model_fields.items():
        path, own = f"{above}{name}", counts and changes_results(field)
        inner = list(_classes(field.annotation))
        kind = " or ".join(dict.fromkeys(_type(field.annotation)))
        yield Setting(path, kind, _default(field), field.description or "", own)
        several = get_origin(_bare(field.annotation)) is list
        for one in inner:
            known_by = f"{path}[{_kind_of(one)}]." if len(inner) > 1 else f"{path}[]." if several else f"{path}."
            yield from _settings(one, known_by, own)


def _kind_of(cls: type[Settings]) -> str:
    field = cls.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field is not None else cls.__name__


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _parts(annotation: Any) -> Iterator[Any]:
    """What a type is put together of, but for what only says how it is checked."""
    annotation = _bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _classes(annotation: Any) -> Iterator[type[Settings]]:
    """The settings that a field may hold."""
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, Settings):
            yield part
        elif get_origin(part) in (list, tuple):
            yield from _classes(get_args(part)[0])


def _type(annotation: Any) -> Iterator[str]:
    for part in _parts(annotation):
        origin, inner = get_origin(part), get_args(part)
        if part is type(None):
            yield "none"
        elif origin is Literal:
            yield from (json.dumps(value) if not isinstance(value, str) else value for value in inner)
        elif origin in (list, tuple):
            yield f"list of {' or '.join(dict.fromkeys(_type(inner[0])))}"
        elif isinstance(part, type) and issubclass(part, Settings):
            yield "settings"
        elif part is Secret:
            yield "env:NAME or file:PATH"
        else:
            yield _NAMES.get(origin or part, "value")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        return "{}"
    return "none" if value is None else json.dumps(value, default=str, ensure_ascii=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

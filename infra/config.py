"""Strict typed settings: what may be set, what it means, and what a result depends on.

A settings class is a frozen pydantic model. Unknown keys are refused with the nearest known one. Every field counts
towards the digest, the name of the work that the settings describe, unless it is marked `operational`: retries,
workers and timeouts change how long work takes, never what comes out, and must not make finished work stale.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import ErrorDetails, core_schema

from infra.errors import SettingsError

_OPERATIONAL = "operational"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def results(self) -> dict[str, Any]:
        """The settings that change results, as plain JSON values: what the digest is made of."""
        return _results(self)


S = TypeVar("S", bound=Settings)


def operational(default: Any = ..., **limits: Any) -> Any:
    """A field that changes when or how fast work is done but never its result."""
    return Field(default, json_schema_extra={_OPERATIONAL: True}, **limits)


def _results(settings: Settings) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get(_OPERATIONAL):
            continue
        kept[name] = _plain(getattr(settings, name))
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return None  # a result that depended on a password would be a result nobody could repeat
    if isinstance(value, Settings):
        return _results(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(v) for v in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, Path):
        return str(value)
    return value


def canonical_json(value: Any) -> str:
    """One text for one value, whatever the order of its keys."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


class Secret:
    """A value that lives in the environment or in a file and is named, never written, in settings.

    `env:NAME` and `file:PATH` are the only forms: a literal password in a recipe would end up in records and logs.
    """

    def __init__(self, reference: str) -> None:
        kind, _, where = reference.partition(":")
        if kind not in ("env", "file") or not where:
            # The reference itself is not repeated: it may be the password that should not have been there.
            raise ValueError("a secret is written env:NAME or file:PATH, never as the value itself")
        self.reference = reference

    def reveal(self) -> str:
        kind, _, where = self.reference.partition(":")
        if kind == "env":
            value = os.environ.get(where)
            if value is None:
                raise SettingsError(f"the environment variable {where} is not set", remedy=f"export {where}=...")
            return value
        try:
            return Path(where).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(
                f"the secret file {where} cannot be read ({error.strerror})", remedy="create it, or name another one"
            ) from None

    def __repr__(self) -> str:
        return f"Secret({self.reference!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reference == self.reference

    def __hash__(self) -> int:
        return hash(self.reference)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def read(value: object) -> Secret:
            if isinstance(value, Secret):
                return value
            if isinstance(value, str):
                return cls(value)
            raise ValueError("a secret is written env:NAME or file:PATH")

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(lambda secret: secret.reference)
        )


Fraction = Annotated[float, Field(ge=0, le=1)]


def parse(cls: type[S], data: Any, *, where: str = "") -> S:
    """Settings from plain data; the error names every wrong key and the nearest right one."""
    if not isinstance(data, Mapping):
        raise SettingsError(
            f"{where or cls.__name__} must be a mapping of settings, got {type(data).__name__}",
            remedy="write `name: value` lines",
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise SettingsError(
            "; ".join(_problem(cls, problem, where) for problem in problems[:5]), remedy=_remedy(cls, problems)
        ) from None


def _problem(cls: type[Settings], problem: ErrorDetails, where: str) -> str:
    path = ".".join([*([where] if where else []), *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting `{path}`"
    if problem["type"] == "missing":
        return f"`{path}` is not set"
    text = problem["msg"].removeprefix("Value error, ")
    return f"`{path}`: {text[:1].lower()}{text[1:]}"


def _remedy(cls: type[Settings], problems: list[ErrorDetails]) -> str:
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            known = _known_keys(cls, [str(part) for part in problem["loc"][:-1]])
            near = nearest(str(problem["loc"][-1]), known)
            return f"did you mean `{near}`?" if near else f"known here: {', '.join(sorted(known))}"
    return "correct the value and run again"


def _known_keys(cls: type[Settings], path: list[str]) -> list[str]:
    """The keys that the settings class at `path` knows; list indexes and union tags are stepped over."""
    here: type[BaseModel] = cls
    for part in path:
        field = here.model_fields.get(part)
        if field is None:
            continue
        inner = _settings_in(field.annotation)
        if inner is None:
            break
        here = inner
    return list(here.model_fields)


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _settings_in(argument):
            return found
    return None


def nearest(word: str, known: Iterable[str]) -> str | None:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def load_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"there is no file {path}", remedy="check the path") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror})", remedy="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = str(getattr(error, "problem_mark", "")).strip() or str(path)
        raise SettingsError(f"{path} is not valid YAML {place}", remedy="correct it at the place named") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds no settings", remedy="write `name: value` lines")
    settings: dict[str, Any] = data
    return settings


def override(data: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b=value` of the command line put in; values are YAML (`3`, `true`, `[1, 2]`)."""
    result = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise SettingsError(f"`--set {assignment}` is not an assignment", remedy="write --set name.part=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SettingsError(f"the value in `--set {assignment}` is not YAML", remedy="quote it") from None
        here = result
        for key in keys[:-1]:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                raise SettingsError(f"`{key}` in `--set {assignment}` holds no settings", remedy="check the path")
        here[keys[-1]] = value
    return result

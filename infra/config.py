"""Strict typed settings: what may be set, and which of it results depend on.

A settings class is a frozen pydantic model. Unknown keys are refused with the nearest known one. Every field counts
towards the digest, which names the work that the settings describe, unless it is marked `operational`: retries,
workers and timeouts change how long work takes, never its result, and must not make finished work stale.

A digest is made of `chosen`, which leaves out settings that have their default. So a new field with a default leaves
earlier digests as they were, and a default may only change together with the format number of the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from infra.errors import SettingsError
from infra.problems import Misfit, faults, settings_error, shown
from infra.problems import nearest as nearest

_OPERATIONAL = "operational"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def results(self) -> dict[str, Any]:
        """The settings that change results, as plain JSON values. Records store these."""
        return {name: _plain(getattr(self, name)) for name in _counted(type(self))}

    def chosen(self) -> dict[str, Any]:
        """Those of `results` that differ from their defaults, and the `kind`. Digests are made of these."""
        defaults, results = _defaults(type(self)), self.results()
        return {
            name: _chosen(getattr(self, name))
            for name, value in results.items()
            if name not in defaults or canonical_json(value) != defaults[name]
        }


S = TypeVar("S", bound=Settings)


def changes_results(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get(_OPERATIONAL))


def operational(default: Any = ..., **limits: Any) -> Any:
    """A field that changes when or how fast work is done, but never its result."""
    return Field(default, json_schema_extra={_OPERATIONAL: True}, **limits)


@cache
def _counted(cls: type[Settings]) -> list[str]:
    return [name for name, field in cls.model_fields.items() if changes_results(field)]


@cache
def _defaults(cls: type[Settings]) -> dict[str, str]:
    """The fields' defaults, as JSON texts; without that of a `kind` that has one possible value: digests contain it."""
    defaults = {}
    for name, field in cls.model_fields.items():
        is_tag = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        if not field.is_required() and not is_tag:
            annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            default = field.get_default(call_default_factory=True)
            defaults[name] = canonical_json(TypeAdapter(annotation).validate_python(default))
    return defaults


def _chosen(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.chosen()
    if isinstance(value, Mapping):
        return {str(k): _chosen(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_chosen(v) for v in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return None  # results must not depend on a secret: nobody else could repeat them
    if isinstance(value, Settings):
        return value.results()
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
    """The same text for equal values, whatever the order of their keys."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


class Secret:
    """A secret, which settings name as `env:NAME` or `file:PATH`, such as `env:AWS_SECRET_ACCESS_KEY`.

    The value itself is refused: a password in a recipe would end up in records and logs.
    """

    def __init__(self, reference: str) -> None:
        kind, _, place = reference.partition(":")
        if kind not in ("env", "file") or not place:
            # The reference itself is not repeated: it may be the password that should not have been there.
            raise ValueError("a secret is written env:NAME or file:PATH, never as the value itself")
        self.reference = reference

    def reveal(self) -> str:
        kind, _, place = self.reference.partition(":")
        if kind == "env":
            value = os.environ.get(place)
            if value is None:
                raise SettingsError(f"the environment variable {place} is not set", remedy=f"export {place}=...")
            return value
        try:
            return Path(place).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(
                f"the secret file {place} cannot be read ({error.strerror})", remedy="create it, or name another one"
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


def check(cls: type[Settings], data: Any) -> None:
    """For validators: raises if a value is not valid as these settings."""
    try:
        cls.model_validate(data)
    except ValidationError as error:
        raise Misfit(cls, error) from None


class Refused(ValueError):
    """A validator's error that carries a remedy."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def spelt(pattern: str, like: str) -> AfterValidator:
    """A validator of texts that match the pattern; `like` describes the form in the error: "write ..."."""

    def match(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise Refused(f"{shown(text)} cannot be used", remedy=f"write {like}")
        return text

    return AfterValidator(match)


# The name of a workflow or a source: it becomes the name of a folder and of MLflow's run, or a part of keys.
Name = Annotated[
    str, spelt(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "at most 100 letters, digits, `_`, `.` and `-`, no mark first")
]


def parse(cls: type[S], data: Any, *, where: str = "", shared: Mapping[str, Any] | None = None) -> S:
    """Settings from plain data; the error names every wrong key and the nearest right one.

    `where` is the path at which they were written, for errors: "low". `shared` holds the defaults that were merged into
    `data`, by the path at which these were written: {"defaults.train": {...}}.
    """
    if not isinstance(data, Mapping):
        raise SettingsError(
            f"{f'`{where}`' if where else cls.__name__} must be a mapping of settings, not {shown(data)}",
            remedy="write `name: value` lines",
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise settings_error(faults(cls, error, data, {where: data, **(shared or {})})) from None

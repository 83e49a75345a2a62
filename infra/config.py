"""Strict typed settings: what may be set, what it means, and what a result depends on.

A settings class is a frozen pydantic model. Unknown keys are refused with the nearest known one. Every field counts
towards the digest, the name of the work that the settings describe, unless it is marked `operational`: retries,
workers and timeouts change how long work takes, never what comes out, and must not make finished work stale.

A digest is made of `chosen`, which leaves out what has its default. So a new field with a default renames nothing that
was made before there was one, and a default may only change together with the format number of the work.
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
from infra.problems import Misfit, faults, shown, told
from infra.problems import nearest as nearest

_OPERATIONAL = "operational"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def results(self) -> dict[str, Any]:
        """The settings that change results, as plain JSON values: what records tell."""
        return {name: _plain(getattr(self, name)) for name in _counted(type(self))}

    def chosen(self) -> dict[str, Any]:
        """The results settings that differ from their defaults, and the `kind`. Digests are made of these."""
        defaults, found = _defaults(type(self)), self.results()
        return {
            name: _chosen(getattr(self, name))
            for name, value in found.items()
            if name not in defaults or canonical_json(value) != defaults[name]
        }


S = TypeVar("S", bound=Settings)


def changes_results(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get(_OPERATIONAL))


def operational(default: Any = ..., **limits: Any) -> Any:
    """A field that changes when or how fast work is done but never its result."""
    return Field(default, json_schema_extra={_OPERATIONAL: True}, **limits)


@cache
def _counted(cls: type[Settings]) -> list[str]:
    """The fields that change results."""
    return [name for name, field in cls.model_fields.items() if changes_results(field)]


@cache
def _defaults(cls: type[Settings]) -> dict[str, str]:
    """The values that fields have where nothing is said, as texts; of one that tells which kind it is, none."""
    found = {}
    for name, field in cls.model_fields.items():
        only = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        if not field.is_required() and not only:
            annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            default = field.get_default(call_default_factory=True)
            found[name] = canonical_json(TypeAdapter(annotation).validate_python(default))
    return found


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
        return None  # a result that depended on a password would be a result nobody could repeat
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


def check(cls: type[Settings], data: Any) -> None:
    """For validators: whether a value makes these settings."""
    try:
        cls.model_validate(data)
    except ValidationError as error:
        raise Misfit(cls, error) from None


class Refused(ValueError):
    """What a validator says of a value, where it knows what to do as well."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def spelt(pattern: str, like: str) -> AfterValidator:
    """Text of this form: `like` says it in words, as the error does."""

    def match(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise Refused(f"{shown(text)} cannot be used", remedy=f"write {like}")
        return text

    return AfterValidator(match)


def parse(cls: type[S], data: Any, *, where: str = "", shared: Mapping[str, Any] | None = None) -> S:
    """Settings from plain data; the error names every wrong key and the nearest right one.

    `where` they were written, and `shared`: other such places -> what settings of this kind have in common there.
    """
    if not isinstance(data, Mapping):
        raise SettingsError(
            f"{f'`{where}`' if where else cls.__name__} must be a mapping of settings, not {shown(data)}",
            remedy="write `name: value` lines",
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise told(faults(cls, error, data, {where: data, **(shared or {})})) from None

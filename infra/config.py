"""Strict typed settings: what may be set, what it means, and what a result depends on.

A settings class is a frozen pydantic model. Unknown keys are refused with the nearest known one. Every field counts
towards the digest, the name of the work that the settings describe, unless it is marked `operational`: retries,
workers and timeouts change how long work takes, never what comes out, and must not make finished work stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import core_schema

from infra.errors import SettingsError
from infra.problems import Misfit, shown, tell
from infra.problems import nearest as nearest

_OPERATIONAL = "operational"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

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
        told = tell(cls, error, data, {where: data, **(shared or {})})
        raise SettingsError(told.message, remedy=told.remedy) from None

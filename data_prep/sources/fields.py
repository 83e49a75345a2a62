"""Values within values, as JSON and Parquet nest them: `turns.1.value`, `captions.short`, `sentences.raw`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

_PLACE = re.compile("[0-9]{1,6}")


def field(value: Any, path: str) -> Any:
    """Fields of objects by their names and places in lists by their numbers; None where there is nothing.

    A list whose places are not named is gone through: then it is a list of what its elements have.
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    return _within(value, path.split("."))


def _within(value: Any, path: list[str]) -> Any:
    if not path or value is None:
        return value
    here, *rest = path
    if isinstance(value, dict):
        return _within(value.get(here), rest)
    if not isinstance(value, list):
        return None
    if _PLACE.fullmatch(here):
        return _within(value[int(here)], rest) if int(here) < len(value) else None
    found = [_within(element, path) for element in value]
    return [one for each in found if each is not None for one in (each if isinstance(each, list) else [each])]


def top(names: list[str], path: str) -> str:
    """The column that a path begins with: the longest name that is one; empty if there is none."""
    parts = path.split(".")
    starts = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((start for start in starts if start in names), "")


def kind_of(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of what a path leads to; None where it leads nowhere."""
    start = top(schema.names, path)
    if not start:
        return None
    kind, is_many = schema.field(start).type, False
    for part in filter(None, path[len(start) :].split(".")):
        if is_list(kind) and _PLACE.fullmatch(part):
            kind = kind.value_type
            continue
        kind, is_many = element(kind), is_many or is_list(kind)
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return pa.list_(kind) if is_many and not is_list(kind) else kind


def element(kind: pa.DataType) -> pa.DataType:
    """What the lists of a type are lists of."""
    return element(kind.value_type) if is_list(kind) else kind


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) or is_odd_list(kind)


def is_odd_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_fixed_size_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind))


def has_odd_lists(kind: pa.DataType) -> bool:
    if is_odd_list(kind):
        return True
    if is_list(kind):
        return has_odd_lists(kind.value_type)
    return bool(pa.types.is_struct(kind)) and any(has_odd_lists(inner.type) for inner in kind)


def leaves(kind: pa.DataType, name: str) -> Iterator[tuple[str, pa.DataType]]:
    """The paths to all that is in a column, and the types of what they lead to, lists of it as well."""
    inner = element(kind)
    if not pa.types.is_struct(inner):
        yield name, kind
        return
    for within in inner:
        yield from leaves(within.type, f"{name}.{within.name}")


def listed(value: Any, depth: int = 3) -> list[Any]:
    """All that is in a value: of an object or a list what it holds, down to where nobody nests texts."""
    if not depth or not isinstance(value, dict | list):
        return [value]
    held = value.values() if isinstance(value, dict) else value
    return [found for one in held for found in listed(one, depth - 1)]


def flat(row: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """A row with the fields of its objects, and of lists of objects, by their paths."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        example = next((one for one in value if one is not None), None) if isinstance(value, list) else value
        if depth and isinstance(example, dict):
            found |= flat({f"{name}.{inner}": field(value, inner) for inner in example}, depth - 1)
        else:
            found[name] = value
    return found

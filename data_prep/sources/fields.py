"""Paths into nested values of JSON and Parquet: `turns.1.value`, `captions.short`, `sentences.raw`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

_INDEX = re.compile("[0-9]{1,6}")  # of an element of a list


def field(value: Any, path: str) -> Any:
    """The value that a path leads to, by the names of an object's fields and the indices of a list; None without one.

    A path that names no index of a list leads to the list of what it leads to in each element: of
    {"sentences": [{"raw": "a"}, {"raw": "b"}]}, `sentences.1.raw` is "b" and `sentences.raw` is ["a", "b"].
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    return _within(value, path.split("."))


def _within(value: Any, path: list[str]) -> Any:
    if not path or value is None:
        return value
    step, *rest = path
    if isinstance(value, dict):
        return _within(value.get(step), rest)
    if not isinstance(value, list):
        return None
    if _INDEX.fullmatch(step):
        return _within(value[int(step)], rest) if int(step) < len(value) else None
    inner = [_within(element, path) for element in value]
    return [leaf for one in inner if one is not None for leaf in (one if isinstance(one, list) else [one])]


def top(names: list[str], path: str) -> str:
    """The column that a path begins with: the longest of these names, which may hold dots; empty if there is none."""
    parts = path.split(".")
    starts = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((start for start in starts if start in names), "")


def kind_of(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of the values that a path leads to; None where it leads nowhere."""
    start = top(schema.names, path)
    if not start:
        return None
    kind, is_many = schema.field(start).type, False
    for step in filter(None, path[len(start) :].split(".")):
        if is_list(kind) and _INDEX.fullmatch(step):
            kind = kind.value_type
            continue
        kind, is_many = element(kind), is_many or is_list(kind)
        if not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
            return None
        kind = kind.field(step).type
    return pa.list_(kind) if is_many and not is_list(kind) else kind


def element(kind: pa.DataType) -> pa.DataType:
    """The type of the elements of a list type, or of lists in it; any other type itself."""
    return element(kind.value_type) if is_list(kind) else kind


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) or is_odd_list(kind)


def is_odd_list(kind: pa.DataType) -> bool:
    """Whether it is one of the list types that Arrow does not read back from Parquet as they were."""
    types = pa.types
    return bool(types.is_fixed_size_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind))


def has_odd_lists(kind: pa.DataType) -> bool:
    if is_odd_list(kind):
        return True
    if is_list(kind):
        return has_odd_lists(kind.value_type)
    return bool(pa.types.is_struct(kind)) and any(has_odd_lists(inner.type) for inner in kind)


def leaves(kind: pa.DataType, name: str) -> Iterator[tuple[str, pa.DataType]]:
    """The path to each field without fields of its own in a column, and the type of the value it leads to."""
    inner = element(kind)
    if not pa.types.is_struct(inner):
        yield name, kind
        return
    for within in inner:
        yield from leaves(within.type, f"{name}.{within.name}")


def listed(value: Any, depth: int = 3) -> list[Any]:
    """The values in an object or a list, and in those nested in it to a depth of three; any other value alone."""
    if not depth or not isinstance(value, dict | list):
        return [value]
    elements = value.values() if isinstance(value, dict) else value
    return [leaf for element in elements for leaf in listed(element, depth - 1)]


def flat(row: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """A row in which the fields of nested objects, and of lists of objects, are columns named by their paths."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        example = (
            next((element for element in value if element is not None), None) if isinstance(value, list) else value
        )
        if depth and isinstance(example, dict):
            columns |= flat({f"{name}.{inner}": field(value, inner) for inner in example}, depth - 1)
        else:
            columns[name] = value
    return columns

"""Reading settings from YAML files and from the command line's assignments (`--set low.steps=50`).

A file may come from anybody. It is read by the safe loader, which makes plain values only. A key that is set twice, an
alias that contains itself, and aliases that expand to very many values are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from infra.errors import SettingsError
from infra.files import read_text

MOST_VALUES = 100_000  # in a file, with every alias expanded
MERGE = "tag:yaml.org,2002:merge"


def load_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        data = read_yaml(read_text(path))
    except NotYaml as error:
        raise SettingsError(f"{path}{error}", remedy="correct it there, and run again") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds no settings", remedy="write `name: value` lines")
    settings: dict[str, Any] = data
    return settings


class NotYaml(ValueError):
    """The text begins with the position, to be put after a file's name: `, line 3, column 5: ...`."""


def read_yaml(text: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise NotYaml(f"{place}: {error.problem or error.context or 'this is no YAML'}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise NotYaml(f": {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise NotYaml(": it is nested too deeply") from None
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise NotYaml(f": a value cannot be read ({str(error).splitlines()[0]})") from None


class _Loader(yaml.SafeLoader):
    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            _measure(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses keys that are set twice. Keys that `<<` merges are not in the mapping yet: one may override them."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            earlier = first.setdefault((key.tag, key.value), key)
            if earlier is not key:
                raise yaml.MarkedYAMLError(
                    problem=f"`{key.value}` is set for the second time, first in line {earlier.start_mark.line + 1}",
                    problem_mark=key.start_mark,
                )
        return node


def _measure(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values in the node, with every alias expanded.

    `known`: id of a node -> its size, or 0 while that is being computed: who meets a 0 is inside of the node itself.
    """
    size = known.get(id(node))
    if size is None:
        known[id(node)] = 0
        size = 1 + sum(_measure(child, known) for child in _children(node))
        known[id(node)] = size
    if not 0 < size <= MOST_VALUES:
        problem = f"this stands for more than {MOST_VALUES:,} values" if size else "this contains itself, by an alias"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return size


def lines_of(path: Path) -> dict[str, int]:
    """The line of every setting in a YAML file, by the setting's path: `stages.low.steps`."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, above: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                note(f"{above}{key.value}", key, value)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                note(f"{above}{number}", item, item)

    def note(name: str, at: yaml.Node, value: yaml.Node) -> None:
        lines[name] = at.start_mark.line + 1
        walk(value, f"{name}.")

    loader = _Loader(path.read_text(encoding="utf-8-sig"))
    try:
        walk(loader.get_single_node(), "")
    finally:
        loader.dispose()
    return lines


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def override(data: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each assignment of the command line carried out, such as `low.steps=50`.

    Values are YAML (`3`, `true`, `[1, 2]`). Items of a list are named by number, from 0: `prepare.sources.0.url=...`.
    """
    result = copy.deepcopy(data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise SettingsError(f"`--set {assignment}` is not an assignment", remedy="write --set name.part=value")
        try:
            value = read_yaml(text)
        except NotYaml as error:
            raise SettingsError(f"the value of `--set {assignment}`{error}", remedy="put it into quotes") from None
        container: Any = result
        for number, key in enumerate(keys):
            index = _index(container, key, f"`{'.'.join(keys[:number])}` in `--set {assignment}`")
            if number == len(keys) - 1:
                container[index] = value
            elif isinstance(container, dict) and container.get(key) is None:
                container[key] = {}
            container = container[index]
    return result


def _index(container: Any, key: str, name: str) -> str | int:
    """What `key` means in a mapping or a list; `name` is the container's, for errors."""
    if isinstance(container, dict):
        return key
    if not isinstance(container, list):
        raise SettingsError(f"{name} holds no settings", remedy="check the path")
    if not key.isdecimal() or int(key) >= len(container):
        raise SettingsError(
            f"{name} is a list of {len(container)}, counted from 0",
            remedy="name a part of it by its number, or give the whole list",
        )
    return int(key)

"""Whatever is wrong in a recipe's stage is told in its writer's words, under a path that they wrote."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest

from infra.config import parse
from infra.errors import SettingsError
from infra.problems import Path, classes_at, value_at
from pipelines.stages.kinds import KINDS

LOCAL = {"name": "web", "url": "/data/web"}
SOURCES: list[dict[str, Any]] = [
    {"kind": "table_folder", **LOCAL, "tables": ["*.parquet"]},
    {"kind": "text_folder", **LOCAL},
    {"kind": "url_list", **LOCAL, "tables": ["*.csv"], "image": "URL", "captions": ["TEXT"]},
    {"kind": "webdataset", **LOCAL, "keep": {"stars": "int"}, "fields": {"stars": "votes.stars"}},
    {"kind": "parquet_images", **LOCAL, "tables": ["*.parquet"]},
    {"kind": "imagenet", **LOCAL},
    {"kind": "sa1b", **LOCAL, "tables": ["*.parquet"]},
]
ASKS = [{"kind": "long", "prompt": "Describe it."}]
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("corpus", {"count": 100}),
    *(("prepare", {"sources": [source], "sizes": [256], "fetch": {"at_once": 8}}) for source in SOURCES),
    ("prepare", {"sources": [SOURCES[1]], "sizes": [64, {"name": "b512", "side": 512}], "matte": [0, 0, 0]}),
    (
        "score",
        {"shards": "a", "scorer": {"kind": "clip", "pretrained": "x", "heads": [{"name": "nice", "file": "x.pth"}]}},
    ),
    ("score", {"shards": "a", "scorer": {"kind": "vlm", "model": "m", "asks": ASKS}}),
    ("score", {"shards": "a", "scorer": {"kind": "endpoint", "model": "m", "url": "http://h/v1", "asks": ASKS}}),
    ("snapshot", {"shards": "a", "scored": ["b"], "captions": {"long": 1}, "weights": {"web": 2}}),
    ("snapshot", {"shards": "a", "captions": [{"kind": "long", "weight": 1, "words": [1, None]}]}),
    ("encoders", {"captions": "a", "text": {"hidden": 96}, "vision": {"layers": 2}}),
    (
        "train",
        {
            "data": "a",
            "steps": 10,
            "batch": 4,
            "preset": "tiny",
            "model": {"image_size": 32},
            "objective": {"repa": 0.1, "repa_block": 2},
            "optim": {"betas": [0.9, 0.99]},
            "reading": {"lanes": 64},
            "ema": {"decay": 0.9},
        },
    ),
    ("evaluate", {"checkpoint": "a", "sampling": {"interval": [0, 1], "size": [32, 32]}}),
    ("dpg", {"checkpoint": "a", "judge": {"kind": "vlm", "model": "b"}, "mode": "compat"}),
    ("fid", {"checkpoint": "a", "data": "b", "count": 100, "split": "held_out"}),
    ("gate", {"scores": ["a", "b"], "rules": [{"at_least": 0.5, "above": "b"}]}),
    ("register", {"gate": "a", "checkpoint": "b", "scores": "c"}),
    ("report", {"title": "x"}),
    ("sample", {"checkpoint": "a", "data": "b", "prompts": ["a dog"], "sampling": {"steps": 4}}),
]
WRONG: list[Any] = [None, True, -7, 10**9, 2.5, float("nan"), "", "no such / word"]
WRONG += [[], ["x", 3], {}, {"x": {}}, {3: "x"}]

PYDANTIC = re.compile(
    r"function-|type=|tagged|union|validation error|validator|basemodel|input|constrained|pars(e|ing)|schema"
    r"|discriminator|field required|dict\b|dictionary|instance|\bint\[|\bstr\b|\blist\[|traceback|permitted|loc\b",
    re.IGNORECASE,
)


def test_there_is_an_example_of_every_kind():
    assert {kind for kind, _ in EXAMPLES} == KINDS.keys()


@pytest.mark.parametrize(("kind", "example"), EXAMPLES, ids=lambda given: given if isinstance(given, str) else "")
def test_every_mistake_is_told_in_plain_words_at_a_path_that_was_written(kind: str, example: dict[str, Any]):
    parse(KINDS[kind].settings, example, where="mine")
    told = [(data, path, error) for data, path in mistakes(kind, example) if (error := refusal(kind, data))]
    assert len(told) > 10
    for data, path, error in told:
        assert not PYDANTIC.search(plain(str(error))), error
        assert "\n" not in str(error)
        named = paths(error.message)
        assert set(named) <= written(data), f"{error}: {data}"
        assert any(found[: len(path)] == path[: len(found)] for found in named), (path, error)


def refusal(kind: str, data: dict[str, Any]) -> SettingsError | None:
    try:
        parse(KINDS[kind].settings, data, where="mine")
    except SettingsError as error:
        return error
    return None


def mistakes(kind: str, example: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Path]]:
    """The example with something wrong at each place in turn, and a key too many in each mapping."""
    for path in sorted(set(places(kind, example, ())), key=str):
        for wrong in WRONG:
            yield changed(example, path, wrong), path
        if isinstance(value_at(example, path), dict):
            yield changed(example, (*path, "strange_key"), 1), (*path, "strange_key")
            yield changed(example, (*path, 7), 1), (*path, 7)
    yield changed(example, ("strange_key",), 1), ("strange_key",)


def places(kind: str, example: dict[str, Any], above: Path) -> Iterator[Path]:
    """What is set in the example, and what could be."""
    value = value_at(example, above)
    here: list[str | int] = []
    if isinstance(value, dict):
        known = {name for model in classes_at(KINDS[kind].settings, above, example) for name in model.model_fields}
        here = [*value, *(known - value.keys())]
    elif isinstance(value, list):
        here = [*range(len(value))]
    for part in here:
        yield (*above, part)
        yield from places(kind, example, (*above, part))


def changed(example: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(example)
    here: Any = data
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = value
    return data


def paths(message: str) -> list[Path]:
    """Those of the stage that a message names; what is missing is not there, so its last part is left out."""
    found = []
    for text, after in re.findall(r"`(mine(?:\.[^`]*)?)`( is not set)?", message):
        parts = tuple(int(part) if part.lstrip("-").isdecimal() else part for part in text.split(".")[1:])
        found.append(parts[:-1] if after else parts)
    return found


def written(data: Any, above: Path = ()) -> set[Path]:
    found = {above}
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in pairs:
        found |= written(value, (*above, name))
    return found


def plain(message: str) -> str:
    """Without what was quoted, whatever it was."""
    return re.sub(r"'[^']*'|`[^`]*`", "", message)

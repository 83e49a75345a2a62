"""Recipes and assignments as people and strangers write them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from infra.errors import SettingsError
from infra.yaml_settings import load_yaml, override


def test_the_command_line_overrides_a_copy():
    data = {"a": {"b": 1}, "c": [1]}
    changed = override(data, ["a.b=2", "a.d=[x, y]", "e.f=true"])
    assert changed == {"a": {"b": 2, "d": ["x", "y"]}, "c": [1], "e": {"f": True}}
    assert data == {"a": {"b": 1}, "c": [1]}


def test_a_part_of_a_list_is_named_by_its_number():
    data = {"sources": [{"url": "a"}, {"url": "b"}], "more": None}
    changed = override(data, ["sources.1.url=c", "more.x=1", "sources.0=d"])
    assert changed == {"sources": ["d", {"url": "c"}], "more": {"x": 1}}


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("a.b", "is not an assignment"),
        ("=3", "is not an assignment"),
        ("a..b=1", "is not an assignment"),
        ("c.d=1", "`c` in `--set c.d=1` holds no settings"),
        ("l.1=1", "`l` in `--set l.1=1` is a list of 1, counted from 0"),
        ("l.x.y=1", "`l` in `--set l.x.y=1` is a list of 1, counted from 0"),
        ("c={x: 1, x: 2}", "`x` is set for the second time"),
        ("c=[", "the value of `--set c=[`, line 1"),
    ],
)
def test_what_is_no_assignment_is_refused(assignment: str, told: str):
    with pytest.raises(SettingsError) as caught:
        override({"c": 3, "l": [1]}, [assignment])
    assert told in str(caught.value)


def nested(first: str, each: str) -> str:
    """Lines each of which names the one before nine times."""
    lines = [f"a: &a {first}"]
    for before, here in pairwise("abcdefghi"):
        lines.append(f"{here}: &{here} {each}".replace("...", ", ".join([f"*{before}"] * 9)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "line 1, column 5: expected the node content"),
        ("- 1", "holds no settings"),
        ("!!python/object/apply:os.system ['true']", "line 1, column 1: could not determine a constructor"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: `a` is set for the second time, first in line 1"),
        ("a:\n  x: &x {y: 1}\nb:\n  <<: *x\n  z: 1\n  z: 2", "line 6, column 3: `z` is set for the second time"),
        ("a: &a [*a]", "line 1, column 4: this contains itself, by an alias"),
        (nested("[lol]", "[...]"), "stands for more than 100,000 values"),
        (nested("{lol: 1}", "{<<: [...]}"), "stands for more than 100,000 values"),
        ("a: " + "[" * 2000, "it is nested too deeply"),
        ("a: 2024-02-30", "a value cannot be read (day is out of range"),
        ("a: " + "1" * 5000, "a value cannot be read"),
        ("a: \x07", "special characters are not allowed"),
        ("{[1]: 2}", "line 1, column 2: found unhashable key"),
    ],
    ids=lambda text: text[:10],
)
def test_yaml_that_is_broken_or_hostile_is_refused_in_one_line(tmp_path: Path, text: str, told: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_yaml(path)
    assert told in caught.value.message
    assert caught.value.message.startswith(str(path))
    assert "\n" not in str(caught.value)


def test_anchors_and_merged_keys_may_be_used(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {y: 4, <<: [*a, {z: 5}]}\nd: *a\n")
    assert load_yaml(tmp_path / "x.yaml") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 4, "z": 5},
        "d": {"x": 1, "y": 2},
    }


def test_a_file_in_another_encoding_is_told_of(tmp_path: Path):
    (tmp_path / "x.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(SettingsError, match="is not UTF-8 text"):
        load_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1")  # as some editors begin a file
    assert load_yaml(tmp_path / "x.yaml") == {"a": 1}


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(SettingsError, match="there is no file"):
        load_yaml(tmp_path / "absent.yaml")

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import Secret, Settings, canonical_json, digest, load_yaml, operational, override, parse
from infra.errors import SettingsError


class Inner(Settings):
    steps: int = 3
    workers: int = operational(2)


class Outer(Settings):
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    key: Secret | None = None
    where: str = operational("here")


def test_only_what_changes_results_is_in_the_digest():
    assert digest(Outer()) == digest(Outer(inner=Inner(workers=9), many=(), where="there"))
    assert digest(Outer()) != digest(Outer(inner=Inner(steps=4)))
    assert digest(Outer(many=(Inner(),))) == digest(Outer(many=(Inner(workers=5),)))


@pytest.mark.parametrize(
    ("data", "message", "remedy"),
    [
        ({"iner": {}}, "unknown setting `iner`", "did you mean `inner`"),
        ({"inner": {"step": 1}}, "unknown setting `inner.step`", "did you mean `steps`"),
        ({"many": [{"worker": 1}]}, "unknown setting `many.0.worker`", "did you mean `workers`"),
        ({"inner": {"steps": "many"}}, "`inner.steps`", "correct the value"),
        ({"zzz": 1}, "unknown setting `zzz`", "known here: inner, key, many, where"),
        ([], "must be a mapping", "name: value"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(data, message, remedy):
    with pytest.raises(SettingsError) as caught:
        parse(Outer, data)
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


def test_secrets_are_named_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PIXNERD_TEST_SECRET", "hunter2")
    settings = parse(Outer, {"key": "env:PIXNERD_TEST_SECRET"})
    assert settings.key is not None
    assert settings.key.reveal() == "hunter2"
    shown = [repr(settings), str(settings), settings.model_dump_json(), canonical_json(settings), repr(settings.key)]
    assert not any("hunter2" in text for text in shown)
    (tmp_path / "key").write_text("swordfish\n")
    assert Secret(f"file:{tmp_path}/key").reveal() == "swordfish"


def test_a_secret_written_out_is_refused_without_being_repeated():
    with pytest.raises(SettingsError) as caught:
        parse(Outer, {"key": "hunter2"})
    assert "env:NAME" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_missing_secret_says_what_to_set():
    with pytest.raises(SettingsError, match="PIXNERD_TEST_ABSENT"):
        Secret("env:PIXNERD_TEST_ABSENT").reveal()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN))
def test_the_digest_does_not_depend_on_the_order_of_keys(value):
    assert digest(value) == digest(dict(reversed(value.items())))


def test_the_command_line_overrides_a_copy():
    data = {"a": {"b": 1}, "c": [1]}
    changed = override(data, ["a.b=2", "a.d=[x, y]", "e.f=true"])
    assert changed == {"a": {"b": 2, "d": ["x", "y"]}, "c": [1], "e": {"f": True}}
    assert data == {"a": {"b": 1}, "c": [1]}


@pytest.mark.parametrize("assignment", ["a.b", "=3", "a..b=1", "c.d=1"])
def test_what_is_no_assignment_is_refused(assignment: str):
    with pytest.raises(SettingsError):
        override({"c": 3}, [assignment])


@pytest.mark.parametrize("text", ["a: [", "- 1", "!!python/object/apply:os.system ['true']"])
def test_yaml_that_is_broken_or_would_run_code_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError):
        load_yaml(path)


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(SettingsError, match="there is no file"):
        load_yaml(tmp_path / "absent.yaml")

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from infra.config import Secret, Settings, canonical_json, digest, operational, parse, spelt
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


class Square(Settings):
    kind: Literal["square"]
    side: int = Field(ge=8)


class Word(Settings):
    kind: Literal["word"]
    letters: Annotated[str, spelt("[a-z]+", "small letters")]
    key: Secret | None = None


class Anything(Settings):
    shape: Annotated[Square | Word, Field(discriminator="kind")] | None = None
    size: Annotated[int, Field(ge=8)] | Square = 8
    pair: tuple[float, float] = (0.0, 1.0)
    rate: float = 1.0
    format: Literal["444", "png"] = "png"
    weights: dict[str, float] = Field({})


AGAIN = "correct the value and run again"
MAPPING = "a mapping of `name: value` lines"


@pytest.mark.parametrize(
    ("data", "message", "remedy"),
    [
        ({"rate": "fast"}, "`rate` must be a number, not 'fast'", AGAIN),
        ({"rate": float("inf")}, "`rate` must be a finite number, not inf", AGAIN),
        ({"rate": None}, "`rate` must be a number, not nothing", AGAIN),
        ({"format": 444}, "`format` must be one of 444 or png, not the number 444", "put it into quotes: '444'"),
        ({"format": "pgn"}, "`format` must be one of 444 or png, not 'pgn'", "did you mean `png`?"),
        ({"pair": [1]}, "`pair` must have at least 2 values", AGAIN),
        ({"shape": {"kind": "sqare"}}, "`shape.kind` is 'sqare', which is not known", "did you mean `square`?"),
        ({"shape": {"side": 9}}, "`shape.kind` is not set", "known: square, word"),
        ({"shape": {"kind": "square"}}, "`shape.side` is not set", "add a line `side: ...`"),
        ({"shape": {"kind": "square", "side": 8, "sid": 1}}, "unknown setting `shape.sid`", "did you mean `side`?"),
        ({"shape": {"kind": "word", "letters": "a/b"}}, "`shape.letters`: 'a/b' cannot be used", "write small letters"),
        ({"size": 3}, "`size` must be at least 8, not 3", AGAIN),
        ({"size": {"kind": "square", "side": 3}}, "`size.side` must be at least 8, not 3", AGAIN),
        ({"size": "big"}, f"`size` must be a whole number or {MAPPING}, not 'big'", AGAIN),
        ({"weights": {3: 1}}, "`weights.3` is named by what is no text", "put the name into quotes, or take it out"),
        (
            {"rate": "x", "sise": 3},
            "`rate` must be a number, not 'x'; unknown setting `sise` (did you mean `size`?)",
            "correct them and run again",
        ),
    ],
)
def test_mistakes_are_told_in_plain_words(data: dict[str, Any], message: str, remedy: str):
    with pytest.raises(SettingsError) as caught:
        parse(Anything, data)
    assert (caught.value.message, caught.value.remedy) == (message, remedy)


def test_a_mistake_in_what_several_stages_share_is_told_where_it_was_written():
    shared = {"inner": {"steps": "x", "workers": 1}}
    with pytest.raises(SettingsError, match=r"^`defaults\.outer\.inner\.steps` must be a whole number"):
        parse(Outer, {"inner": {"steps": "x", "workers": 2}}, where="mine", shared={"defaults.outer": shared})
    with pytest.raises(SettingsError, match=r"^`mine\.inner\.steps` must be"):
        parse(Outer, {"inner": {"steps": "y"}}, where="mine", shared={"defaults.outer": shared})


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

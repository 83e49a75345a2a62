"""The reference of settings is that of the classes, and nothing is left out of it."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import SettingsError
from pipelines.recipes import Recipe
from pipelines.stages import reference
from pipelines.stages.kinds import KINDS


def test_the_page_is_current() -> None:
    now = reference.page()
    assert reference.PAGE.read_text(encoding="utf-8") == now, "run python -m pipelines.stages.reference"


@pytest.mark.parametrize("kind", reference.KNOWN)
def test_every_field_of_a_kind_is_there(kind: str) -> None:
    told = {setting.name for setting in reference.settings_of(kind)}
    settings: Any = KINDS[kind].settings if kind in KINDS else Recipe.model_fields[kind].annotation
    assert settings.model_fields.keys() <= told
    assert len(told) == len(reference.settings_of(kind))


def test_inner_settings_types_defaults_and_what_counts() -> None:
    train = {setting.name: setting for setting in reference.settings_of("train")}
    assert train["optim.lr"][1:] == ("number", "0.0002", "", True)
    assert (train["steps"].default, train["workers"].counts) == ("", False)
    assert train["precision"].type == "fp32 or bf16"
    prepare = {setting.name: setting for setting in reference.settings_of("prepare")}
    assert prepare["sources[url_list].image"].default == '"url"'
    assert prepare["sources[text_folder].caption_suffix"].meaning
    assert not prepare["fetch.at_once"].counts


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(SettingsError, match=r"no kind of stage `trian`.*did you mean `train`"):
        reference.settings_of("trian")

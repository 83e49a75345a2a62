"""The graph's laws, on stages that only count how often they ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.config import Settings, operational
from infra.errors import DataError, SettingsError, StageFailed
from infra.store import Store, open_store
from infra.tracking import Run
from orchestration import workflow
from pipelines.recipes import Recipe
from pipelines.stages import Context, StageKind, stage_reference


class Made(Settings):
    value: int = 0
    speed: int = operational(1)
    above: str | None = stage_reference(None)
    many: list[str] = stage_reference([])


class NoTracker:
    def run(self, *args: Any) -> Run:
        return Run("", None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that ran, in order. A negative value fails."""
    names: list[str] = []

    def work(context: Context, settings: Made, inputs: Any) -> dict[str, Any]:
        names.append(context.stage)
        if settings.value < 0:
            raise DataError("it is negative", remedy="be positive")
        return {"sum": settings.value + sum(record.output["sum"] for record in inputs.values())}

    kinds = {
        "make": StageKind("make", Made, work),
        "tell": StageKind("tell", Made, work, reads_all=True),
    }
    monkeypatch.setattr(workflow, "KINDS", kinds)
    return names


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def recipe(**stages: dict[str, Any]) -> Recipe:
    return Recipe(name="test", stages={name: {"kind": "make", **data} for name, data in stages.items()})


CHAIN = {"a": {"value": 1}, "b": {"above": "a", "value": 2}, "c": {"above": "b"}, "d": {"value": 7}}


def go(store: Store, made: Recipe) -> dict[str, str]:
    """Runs it; returns what was said of each stage last."""
    said: dict[str, str] = {}
    context = Context(store, Path(), NoTracker(), Run("", None), lambda stage, progress: None)  # type: ignore[arg-type]
    workflow.run(workflow.graph(made), context, lambda node, event, text: said.update({node.name: event}))
    return said


def test_what_is_done_is_not_done_again(store: Store, ran: list[str]):
    assert set(go(store, recipe(**CHAIN)).values()) == {"finished"}
    assert ran == ["a", "b", "c", "d"]
    assert set(go(store, recipe(**CHAIN)).values()) == {"reused"}
    assert ran == ["a", "b", "c", "d"]


def test_a_changed_setting_makes_its_stage_and_what_follows_new(store: Store, ran: list[str]):
    go(store, recipe(**CHAIN))
    ran.clear()
    changed = recipe(**{**CHAIN, "b": {"above": "a", "value": 3}})
    assert {p.node.name: p.state for p in workflow.plan(workflow.graph(changed), store)} == {
        "a": "done",
        "b": "new",
        "c": "new",
        "d": "done",
    }
    go(store, changed)
    assert ran == ["b", "c"]


def test_settings_that_change_no_result_make_nothing_new(store: Store, ran: list[str]):
    go(store, recipe(**CHAIN))
    ran.clear()
    go(store, recipe(**{**CHAIN, "b": {"above": "a", "value": 2, "speed": 9}}))
    assert ran == []


def test_a_stage_may_be_renamed(store: Store, ran: list[str]):
    go(store, recipe(a={"value": 1}, b={"above": "a"}))
    ran.clear()
    go(store, recipe(first={"value": 1}, second={"above": "first"}))
    assert ran == []


def test_the_plan_says_why(store: Store, ran: list[str]):
    nodes = workflow.graph(recipe(**CHAIN))
    assert "not run yet" in workflow.plan(nodes, store)[0].why
    go(store, recipe(**CHAIN))
    changed = workflow.graph(recipe(**{**CHAIN, "b": {"above": "a", "value": 3}}))
    why = {p.node.name: p.why for p in workflow.plan(changed, store)}
    assert "value 2 -> 3" in why["b"]
    assert why["c"] == "follows b"


def test_stages_run_in_the_order_of_their_needs(store: Store, ran: list[str]):
    go(store, recipe(z={"above": "y"}, y={"many": ["x", "w"]}, x={}, w={"value": 2}))
    assert ran.index("z") > ran.index("y") > max(ran.index("x"), ran.index("w"))


def test_a_failure_stops_what_needs_it_and_nothing_else(store: Store, ran: list[str]):
    broken = recipe(a={"value": -1}, b={"above": "a"}, c={"value": 5})
    with pytest.raises(StageFailed, match="`a` failed: it is negative"):
        go(store, broken)
    assert ran == ["a", "c"]
    ran.clear()
    go(store, recipe(a={"value": 1}, b={"above": "a"}, c={"value": 5}))
    assert ran == ["a", "b"], "c was done, the failed stage was not"


def test_a_stage_that_reads_all_is_made_again_once_all_is_there(store: Store, ran: list[str]):
    stages: dict[str, Any] = {"a": {"value": -1}, "b": {"value": 3}, "all": {"kind": "tell"}}
    with pytest.raises(StageFailed):
        go(store, recipe(**stages))
    assert ran == ["a", "b", "all"]
    ran.clear()
    with pytest.raises(StageFailed):
        go(store, recipe(**stages))
    assert ran == ["a", "all"]


def test_only_one_kind_and_its_needs(ran: list[str]):
    nodes = workflow.graph(recipe(a={}, b={"above": "a"}, c={"kind": "tell"}))
    assert [node.name for node in workflow.only(nodes, "make")] == ["a", "b"]
    with pytest.raises(SettingsError, match="no `sing` stage"):
        workflow.only(nodes, "sing")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {"above": "b"}, "b": {"above": "a"}}, "wait for each other"),
        ({"a": {"above": "bb"}, "b": {}}, "names the stage `bb`.*did you mean `b`"),
        ({"a": {"valu": 1}}, "unknown setting `a.valu`.*did you mean `value`"),
        ({"a": {"kind": "mak"}}, "not a kind of stage.*did you mean `make`"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(ran: list[str], stages: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        workflow.graph(recipe(**stages))
    assert ran == []

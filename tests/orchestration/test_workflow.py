"""The graph's laws, on stages that only count how often they ran; and what is forgotten, on real ones."""

from __future__ import annotations

import errno
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.snapshots.forget import forget
from infra.cluster import ClusterSettings
from infra.config import Settings, operational
from infra.errors import ClusterError, DataError, SettingsError, StageFailed, Stopped, StoreUnreachable
from infra.records import GateOutput, Output, PrepareSummary, SnapshotOutput, StageRecord, Verdict
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store, open_store
from infra.tracking import NOWHERE, Run
from orchestration import context, launch, parsing, workflow
from orchestration.commands.workflow import report
from orchestration.lease import Driver, tried
from pipelines.recipes import Recipe
from pipelines.stages.base import Context, StageKind, stage_reference
from tests.data_prep.corpora import settings_for, write_corpus


class Made(Settings):
    value: int = 0
    speed: int = operational(1)
    above: str | None = stage_reference(None)
    many: list[str] = stage_reference([])


class MakeOutput(Output, kind="make"):
    sum: int


class TellOutput(MakeOutput, kind="tell"):
    pass


class FindOutput(MakeOutput, kind="find"):
    pass


class NoTracker:
    def run(self, *args: Any) -> Run:
        return NOWHERE


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> dict[str, StageKind]:
    """The kinds of stages that there are for a test, which may add to them."""
    found: dict[str, StageKind] = {}
    monkeypatch.setattr(parsing, "KINDS", found)
    return found


@pytest.fixture
def ran(kinds: dict[str, StageKind]) -> list[str]:
    """The names of the stages that ran, in order. A negative value fails."""
    names: list[str] = []

    def work(kind: type[MakeOutput], context: Context, settings: Made, inputs: Any) -> Output:
        names.append(context.stage)
        if settings.value < 0:
            raise DataError("it is negative", remedy="be positive")
        return kind(sum=settings.value + sum(record.of(MakeOutput).sum for record in inputs.values()))

    kinds |= {
        "make": StageKind("make", Made, partial(work, MakeOutput)),
        "tell": StageKind("tell", Made, partial(work, TellOutput), reads_all=True),
        # What it reads from outside, only the stages before it can tell.
        "find": StageKind(
            "find",
            Made,
            partial(work, FindOutput),
            outside=lambda settings, store, inputs: [r.of(MakeOutput).sum for r in inputs.values()],
        ),
    }
    return names


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def recipe(**stages: dict[str, Any]) -> Recipe:
    return Recipe(name="test", stages={name: {"kind": "make", **data} for name, data in stages.items()})


CHAIN: dict[str, dict[str, Any]] = {
    "a": {"value": 1},
    "b": {"above": "a", "value": 2},
    "c": {"above": "b"},
    "d": {"value": 7},
}


def states(store: Store, made: Recipe) -> dict[str, str]:
    return {plan.node.name: plan.state for plan in workflow.plan(workflow.graph(made, store), store)}


def drop(store: Store, made: Recipe, *names: str) -> None:
    """Deletes the records of stages, as `data verify --drop-damaged` does."""
    for node in workflow.graph(made, store):
        if node.name in names:
            store.delete(node.key)


def go(store: Store, made: Recipe) -> dict[str, str]:
    """Runs it; returns what was said of each stage last."""
    said: dict[str, str] = {}
    context = Context(store, Path(), NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]
    workflow.run(workflow.graph(made, store), context, lambda node, event, text: said.update({node.name: event}))
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
    assert states(store, changed) == {"a": "done", "b": "new", "c": "new", "d": "done"}
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
    nodes = workflow.graph(recipe(**CHAIN), store)
    assert "not run yet" in workflow.plan(nodes, store)[0].why
    go(store, recipe(**CHAIN))
    changed = workflow.graph(recipe(**{**CHAIN, "b": {"above": "a", "value": 3}}), store)
    why = {p.node.name: p.why for p in workflow.plan(changed, store)}
    assert "value 2 -> 3" in why["b"]
    assert why["c"] == "follows b"


def test_a_damaged_record_of_other_work_does_not_stop_the_plan(store: Store, ran: list[str]):
    go(store, recipe(**CHAIN))
    for number, damage in enumerate((b"", b"{", b"[]", b'{"schema_version": 99}', b"\xff")):
        store.put(f"stages/make/{number:016x}.json", damage)
    changed = recipe(**{**CHAIN, "b": {"above": "a", "value": 3}})
    assert states(store, changed) == {"a": "done", "b": "new", "c": "new", "d": "done"}
    why = {plan.node.name: plan.why for plan in workflow.plan(workflow.graph(changed, store), store)}
    assert "value 2 -> 3" in why["b"]


@pytest.mark.parametrize("kind", ["make", "find"])
def test_what_may_be_reused_once_a_dropped_stage_is_made_again_is_not_called_new(
    store: Store, ran: list[str], kind: str
):
    made = recipe(**{**CHAIN, "b": {"kind": kind, "above": "a"}, "all": {"kind": "tell"}})
    go(store, made)
    drop(store, made, "a")
    ran.clear()
    assert states(store, made) == {"a": "new", "b": "open", "c": "open", "d": "done", "all": "open"}
    why = {plan.node.name: plan.why for plan in workflow.plan(workflow.graph(made, store), store)}
    assert why["b"] == "waits for a; reused if what it reads is then as it was"
    assert why["all"].startswith("waits for a, b, c; ")
    assert go(store, made) == {"a": "finished", "b": "reused", "c": "reused", "d": "reused", "all": "reused"}
    assert ran == ["a"]


@pytest.mark.parametrize("kind", ["make", "find"])
def test_what_follows_two_dropped_stages_may_be_reused_as_well(store: Store, ran: list[str], kind: str):
    made = recipe(**{**CHAIN, "b": {"kind": kind, "above": "a"}})
    go(store, made)
    drop(store, made, "b", "a")
    ran.clear()
    assert states(store, made) == {"a": "new", "b": "new", "c": "open", "d": "done"}
    go(store, made)
    assert ran == ["a", "b"]


@pytest.mark.parametrize("kind", ["make", "find"])
def test_what_is_changed_is_new_whatever_it_waits_for(store: Store, ran: list[str], kind: str):
    made = recipe(**{**CHAIN, "b": {"kind": kind, "above": "a"}})
    go(store, made)
    drop(store, made, "a")
    ran.clear()
    changed = recipe(**{**CHAIN, "b": {"kind": kind, "above": "a", "value": 3}})
    assert states(store, changed) == {"a": "new", "b": "new", "c": "new", "d": "done"}
    why = {plan.node.name: plan.why for plan in workflow.plan(workflow.graph(changed, store), store)}
    assert "value 0 -> 3" in why["b"]
    assert why["c"] == "follows b"
    go(store, changed)
    assert ran == ["a", "b", "c"]


def test_commands_take_no_record_for_a_stages_own_before_its_digest_is_settled(
    store: Store, ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = recipe(**CHAIN)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(made.model_dump()))
    name = str(tmp_path / "mine.yaml")

    def paged() -> Any:
        report(name, store=store.url, out=tmp_path / "page.html", json_=True)
        return json.loads(capsys.readouterr().out)["stages"]

    def plans(*, as_json: bool) -> str:
        launch.run(name, store=store.url, assignments=[], address=None, dry_run=True, as_json=as_json)
        return capsys.readouterr().out

    go(store, made)
    assert paged() == ["a", "b", "c", "d"]
    drop(store, made, "a")
    assert paged() == ["d"]
    assert [line[:20].split() for line in plans(as_json=False).splitlines()] == [
        [">", "a", "new"],
        ["?", "b", "open"],
        ["?", "c", "open"],
        ["=", "d", "done"],
    ]
    told = json.loads(plans(as_json=True))
    assert [plan["state"] for plan in told] == ["new", "open", "open", "done"]
    assert [plan["needs"] for plan in told] == [[], ["a"], ["b"], []]
    assert told[1]["command"] == ["pixnerd", "stage", name, "b", "--store", store.url]
    assert told[1]["resources"] == {"workers": 1, "cpus": 1, "gpus": 0}


def test_a_stage_that_reads_all_is_not_reused_while_one_of_them_fails(
    store: Store, ran: list[str], kinds: dict[str, StageKind]
):
    made = recipe(a={"value": 1}, all={"kind": "tell"})
    go(store, made)
    drop(store, made, "a")
    ran.clear()
    kinds["make"] = StageKind("make", Made, failing)
    with pytest.raises(StageFailed):
        go(store, made)
    assert ran == ["all"]


def failing(context: Context, settings: Made, inputs: Any) -> Output:
    raise DataError("the disk is full", remedy="make room")


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


@pytest.mark.parametrize("wish", [KeyboardInterrupt(), Stopped("stopped by SIGTERM", remedy="run again")], ids=repr)
def test_who_is_asked_to_stop_runs_no_other_stage(
    store: Store, ran: list[str], kinds: dict[str, StageKind], wish: BaseException
):
    def stop(context: Context, settings: Made, inputs: Any) -> Output:
        ran.append(context.stage)
        raise wish

    kinds["stop"] = StageKind("stop", Made, stop)
    with pytest.raises(type(wish)):
        go(store, recipe(a={}, b={"kind": "stop"}, c={"value": 3}))
    assert ran == ["a", "b"]


def test_a_full_disk_fails_a_stage_as_other_errors_do(store: Store, ran: list[str], kinds: dict[str, StageKind]):
    def fail(context: Context, settings: Made, inputs: Any) -> Output:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    kinds["fail"] = StageKind("fail", Made, fail)
    with pytest.raises(StageFailed, match=r"the stage `b` failed: the disk is full \(/tmp/x\)") as caught:
        go(store, recipe(a={}, b={"kind": "fail"}, c={"value": 3}))
    assert "TMPDIR" in caught.value.remedy
    assert ran == ["a", "c"]


def test_a_stage_that_reads_all_is_made_again_once_all_is_there(store: Store, ran: list[str]):
    stages: dict[str, Any] = {"a": {"value": -1}, "b": {"value": 3}, "all": {"kind": "tell"}}
    with pytest.raises(StageFailed):
        go(store, recipe(**stages))
    assert ran == ["a", "b", "all"]
    ran.clear()
    with pytest.raises(StageFailed):
        go(store, recipe(**stages))
    assert ran == ["a", "all"]


def corpus(folder: Path, name: str, count: int) -> dict[str, Any]:
    """A prepare stage. Corpora have the same pictures under other keys."""
    write_corpus(folder / name, count)
    [source] = settings_for(folder / name).sources
    data: dict[str, Any] = source.model_dump(exclude_unset=True) | {"name": name}
    return {"kind": "prepare", "sources": [data], "sizes": [16], "rows_per_shard": 8}


def accepted(store: Store, record: StageRecord) -> list[dict[str, Any]]:
    shards = list_shards(store, shard_prefix(record.of(PrepareSummary).plan, "16"))
    return [row for shard in shards for row in read_index(store, shard).to_pylist() if row["accepted"]]


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_forgotten_renews_the_snapshots_that_it_may_concern(store: Store, tmp_path: Path):
    made = Recipe(
        name="test",
        stages={
            "one": corpus(tmp_path, "one", 10),
            "two": corpus(tmp_path, "two", 20),
            "data_one": {"kind": "snapshot", "shards": "one", "size": 16},
            "data_two": {"kind": "snapshot", "shards": "two", "size": 16},
        },
    )
    context = Context(store, tmp_path, NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]

    def nodes(*names: str) -> list[workflow.Node]:
        return [node for node in workflow.graph(made, store) if not names or node.name in names]

    def run(*names: str) -> dict[str, StageRecord]:
        return workflow.run(nodes(*names), context, lambda node, event, text: None)

    one = run("one", "data_one")
    assert states(store, made) == {"one": "done", "data_one": "done", "two": "new", "data_two": "new"}
    early, late = accepted(store, one["one"])[:2]
    forget(store, [early["key"]], "before the second corpus was prepared")
    assert states(store, made) == {"one": "done", "data_one": "new", "two": "new", "data_two": "new"}
    done = run()
    assert set(states(store, made).values()) == {"done"}, "the digest with the list in it is found again"
    counts = {name: dict(done[name].of(SnapshotOutput).counts) for name in ("data_one", "data_two")}
    assert counts["data_one"]["not forgotten"] == counts["data_one"]["accepted"] - 1
    assert counts["data_two"]["not forgotten"] == counts["data_two"]["accepted"] - 1, "its twin, in shards made since"
    forget(store, [late["key"]], "of the first corpus alone", twins=False)
    assert states(store, made) == {"one": "done", "data_one": "new", "two": "done", "data_two": "done"}
    [why] = [plan.why for plan in workflow.plan(nodes("one", "data_one"), store) if plan.node.name == "data_one"]
    assert "what is forgotten" in why
    assert dict(run()["data_one"].of(SnapshotOutput).counts)["not forgotten"] == counts["data_one"]["accepted"] - 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_preparation_that_accepts_nothing_fails_and_so_does_the_next(store: Store, tmp_path: Path):
    stages = {"one": corpus(tmp_path, "one", 3), "two": {"kind": "snapshot", "shards": "one", "size": 512}}
    stages["one"]["sizes"] = [512]
    context = Context(store, tmp_path, NoTracker(), Run("", None), lambda stage, progress: None)  # type: ignore[arg-type]
    for _ in range(2):
        said: list[tuple[str, str]] = []
        with pytest.raises(
            StageFailed, match=r"`one` failed: no image was accepted: 3 rejected \(3 too_small\): lower"
        ):
            workflow.run(
                workflow.graph(Recipe(name="test", stages=stages), store),
                context,
                lambda node, event, text, said=said: said.append((node.name, event)),  # type: ignore[misc]
            )
        assert said == [("one", "running"), ("one", "failed"), ("two", "skipped")]
    stages["one"]["sizes"], stages["two"]["size"] = [16], 16
    workflow.run(workflow.graph(Recipe(name="test", stages=stages), store), context, lambda node, event, text: None)


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


@pytest.mark.parametrize(
    ("before", "now", "chosen", "agree"),
    [
        ({"a": 1}, {"a": 1}, {}, True),
        ({"a": 1}, {"a": 2}, {"a": 2}, False),
        ({"a": 1}, {"a": 1, "new": 5}, {}, True),
        ({"a": 1}, {"a": 1, "new": 6}, {"new": 6}, False),
        ({"inner": {"a": 1}}, {"inner": {"a": 1, "new": 5}}, {}, True),
        ({"inner": {"a": 1}}, {"inner": {"a": 1, "new": 6}}, {"inner": {"new": 6}}, False),
    ],
)
def test_a_record_of_before_a_setting_agrees_with_its_default_alone(before: Any, now: Any, chosen: Any, agree: bool):
    assert workflow._agree(before, now, chosen) is agree


def test_a_recipe_says_how_its_store_and_its_cluster_are_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINE", "secret")
    path = tmp_path / "mine.yaml"
    stages = {"corpus": {"kind": "corpus", "count": 4}}
    keys = {"access_key": "env:MINE", "secret_key": "env:MINE"}
    store = {"endpoint_url": "http://127.0.0.1:9", "region": "x", "patience": 0, **keys}
    path.write_text(yaml.safe_dump({"name": "mine", "stages": stages, "store": store}))

    def begin(url: str, address: str | None = None) -> None:
        launch.run(str(path), store=url, assignments=[], address=address, dry_run=False, as_json=True)

    with pytest.raises(StoreUnreachable, match=r"at 127\.0\.0\.1:9"):
        begin("s3://bucket/prefix")
    asked: list[ClusterSettings] = []

    def unreachable(settings: ClusterSettings) -> None:
        asked.append(settings)
        raise ClusterError("nobody is there", remedy="start one")

    monkeypatch.setattr(context, "connect", unreachable)  # the tests' own cluster is joined already
    monkeypatch.setattr(context, "disconnect", lambda: None)
    cluster = {"address": "127.0.0.1:9", "cpus": 3}
    path.write_text(yaml.safe_dump({"name": "mine", "stages": stages, "cluster": cluster}))
    for given in (None, "127.0.0.1:10"):
        with pytest.raises(ClusterError, match="nobody is there"):
            begin(str(tmp_path / "store"), given)
    assert [(one.address, one.cpus) for one in asked] == [("127.0.0.1:9", 3), ("127.0.0.1:10", 3)]


class JudgeOutput(GateOutput, kind="judge"):
    pass


@pytest.fixture
def gated(kinds: dict[str, StageKind], ran: list[str]) -> dict[str, dict[str, Any]]:
    """A workflow with a gate, which a negative value closes."""

    def judge(context: Context, settings: Made, inputs: Any) -> Output:
        passed = settings.value >= 0
        return JudgeOutput(passed=passed, verdicts=[Verdict(score="s", value=0.25, limit="at least 1", passed=passed)])

    def publish(context: Context, settings: Made, inputs: Any) -> Output:
        ran.append(context.stage)
        return MakeOutput(sum=0)

    def tell(context: Context, settings: Made, inputs: Any) -> Output:
        ran.append(f"{context.stage} of {', '.join(record.stage for record in inputs.values())}")
        return TellOutput(sum=0)

    kinds["judge"] = StageKind("judge", Made, judge)
    kinds["make"] = StageKind("make", Made, publish)
    kinds["tell"] = StageKind("tell", Made, tell, reads_all=True)
    stages: dict[str, dict[str, Any]] = {
        "gate": {"kind": "judge"},
        "publish": {"above": "gate"},
        "all": {"kind": "tell"},
    }
    return stages


def test_behind_a_closed_gate_nothing_runs_and_nothing_has_failed(
    store: Store, ran: list[str], gated: dict[str, dict[str, Any]]
):
    made = recipe(**{**gated, "gate": {"kind": "judge", "value": -1}, "after": {"above": "publish"}})
    assert go(store, made) == {"gate": "finished", "publish": "skipped", "after": "skipped", "all": "finished"}
    assert ran == ["all of gate"]
    assert states(store, made) == {"gate": "done", "publish": "closed", "after": "closed", "all": "done"}
    [_, plan, *_] = workflow.plan(workflow.graph(made, store), store)
    assert plan.why == "not promoted: the gate `gate` is closed (s is 0.250, not at least 1)"
    assert go(store, made) == {"gate": "reused", "publish": "skipped", "after": "skipped", "all": "reused"}
    assert ran == ["all of gate"], "the page is recorded"


def test_behind_an_open_gate_all_runs(store: Store, ran: list[str], gated: dict[str, dict[str, Any]]):
    assert set(go(store, recipe(**gated)).values()) == {"finished"}
    assert ran == ["publish", "all of gate, publish"]


def test_an_error_that_is_not_ours_fails_its_stage_alone(store: Store, ran: list[str], kinds: dict[str, StageKind]):
    def fail(context: Context, settings: Made, inputs: Any) -> Output:
        lost: dict[str, Output] = {}
        return lost["lost"]

    kinds["fail"] = StageKind("fail", Made, fail)
    broken = recipe(a={}, b={"kind": "fail"}, c={"above": "b"}, d={"value": 3})
    with pytest.raises(StageFailed, match="the stage `b` failed: internal error: KeyError: 'lost'"):
        go(store, broken)
    assert ran == ["a", "d"]
    [_, node, *_] = workflow.graph(broken, store)
    [one] = tried(store, "fail", node.digest)
    assert one.end is not None and (one.end.how, one.end.why) == ("failed", "KeyError: 'lost'")
    log = store.get(one.attempt.log).decode()
    assert (
        "Traceback" in log and 'return lost["lost"]' in log and log.splitlines()[0].endswith(f"begun by {one.attempt}")
    )


def test_what_depends_on_files_outside_that_are_wrong_fails_alone(
    store: Store, ran: list[str], kinds: dict[str, StageKind]
):
    def outside(settings: Made, store: Store | None, inputs: Any) -> Any:
        if inputs:
            raise SettingsError("there is no such folder", remedy="name another")

    kinds["fail"] = StageKind("fail", Made, failing, outside=outside)
    with pytest.raises(StageFailed, match="the stage `b` failed: `b`: there is no such folder"):
        go(store, recipe(a={}, b={"kind": "fail", "above": "a"}, c={"value": 3}))
    assert ran == ["a", "c"]


@pytest.mark.parametrize("wish", [KeyboardInterrupt(), Stopped("stopped by SIGTERM", remedy="run again")], ids=repr)
def test_who_is_stopped_leaves_the_stage_to_the_next_at_once(
    store: Store, ran: list[str], kinds: dict[str, StageKind], wish: BaseException
):
    wishes = [wish]

    def stop(context: Context, settings: Made, inputs: Any) -> Output:
        if wishes:
            raise wishes.pop()
        return MakeOutput(sum=1)

    kinds["make"] = StageKind("make", Made, stop)
    with pytest.raises(type(wish)):
        go(store, recipe(a={}))
    go(store, recipe(a={}))
    [node] = workflow.graph(recipe(a={}), store)
    assert [one.end and one.end.how for one in tried(store, "make", node.digest)] == ["stopped", "committed"]


def test_a_store_that_cannot_be_read_ends_the_run_at_once(
    store: Store, ran: list[str], monkeypatch: pytest.MonkeyPatch
):
    def away(*_: Any) -> Any:
        raise StoreUnreachable("the store is away", remedy="wait")

    monkeypatch.setattr(Driver, "take", away)
    with pytest.raises(StoreUnreachable, match="the store is away"):
        go(store, recipe(a={}, b={}))
    assert ran == []

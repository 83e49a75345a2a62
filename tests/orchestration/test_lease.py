"""Leases: whatever is killed, sleeps or comes between any two store calls, each stage is committed once, nobody who has
lost a stage changes anything, and the store tells what happened.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra import layout
from infra.records import CorpusOutput, StageRecord, read_record
from infra.store import Store, StoreSettings, open_store
from infra.tracking import NOWHERE
from orchestration import parsing, workflow
from orchestration.lease import AttemptEnd, Driver, Lease, tried
from orchestration.status import told
from pipelines.recipes import Recipe
from pipelines.stages.base import Context, StageKind
from tests.orchestration.stepped import Memory, Process, Stepped
from tests.orchestration.test_workflow import Made, MakeOutput, NoTracker, TellOutput

# Twelve stages: some need each other, others do not.
NEEDS: dict[str, list[str]] = {
    "a": [],
    "b": [],
    "c": ["a"],
    "d": ["a"],
    "e": ["b"],
    "f": ["c", "d"],
    "g": [],
    "h": ["e", "f"],
    "i": ["g"],
    "j": ["h"],
    "k": ["h", "i"],
}
RECIPE = Recipe(
    name="twelve",
    stages={
        **{name: {"kind": "make", "value": number, "many": NEEDS[name]} for number, name in enumerate(NEEDS)},
        "page": {"kind": "tell"},
    },
)
ONE = Recipe(name="one", stages={"a": {"kind": "make"}})
ACTIONS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["go", "go", "go", "kill", "delay"]), st.integers(1, 60)),
    min_size=1,
    max_size=40,
)


class World:
    """Two drivers on one store, and what the test knows of them that they do not know of each other."""

    def __init__(self, store: Store, recipe: Recipe = RECIPE) -> None:
        self.store, self.recipe = store, recipe
        self.clock = 0.0
        self.drivers: list[Process | None] = [None, None]
        self.holders: dict[tuple[str, int], set[Process]] = {}  # who had a side effect in which attempt at which work
        self.finished = Counter[str]()  # how often a driver has said of a stage that it has done it
        self.said: list[tuple[Process, str, str, str]] = []  # who said of which stage what
        self.wrong: list[str] = []

    def play(self, actions: list[tuple[int, str, int]]) -> None:
        for who, action, much in actions:
            if action == "delay":  # nobody works, as if both machines were asleep
                self.clock += 3.0 * much
                continue
            driver = self.drivers[who] = self.drivers[who] or Process(self.drive)
            driver.go(much)
            if action == "kill":
                driver.kill()
                self.drivers[who] = None
                self.check()

    def finish(self) -> list[dict[str, StageRecord]]:
        """Whoever is alive goes on to the end, and somebody comes who finds it all done."""
        for _ in range(100_000):
            alive = [driver for driver in self.drivers if driver is not None and not driver.ended]
            for driver in alive:
                driver.go()
            if not alive:
                break
        last = Process(self.drive)
        last.go(100_000)
        ended = [driver for driver in (*self.drivers, last) if driver is not None]
        for driver in ended:
            assert driver.ended, "a driver waits for ever"
            if driver.error is not None:
                raise driver.error
        return [driver.result for driver in ended]

    def drive(self, process: Process) -> dict[str, StageRecord]:
        """What a driver does from its beginning to its end."""
        store = Stepped(self.store, process.step)

        def pause(seconds: float) -> None:
            self.clock += seconds * 20
            process.step()

        beating: list[str] = []

        def beats(_: Store, key: str, also: Callable[[], object]) -> AbstractContextManager[None]:
            beating[:] = [key]
            return nullcontext()

        def work(kind: type[MakeOutput], context: Context, settings: Made, inputs: Any) -> MakeOutput:
            parts = layout.HELD.parts(beating[0])
            for beat in (b"1", b"2"):
                store.put(f"{beating[0]}{layout.BEAT}", beat)
            context.check_held()
            # From the check to here nobody else can have done anything.
            if self.store.exists(layout.ENDED.at(**parts)):
                self.wrong.append(f"{parts} had a side effect after its end")
            self.holders.setdefault((parts["digest"], parts["number"]), set()).add(process)
            return kind(sum=settings.value)

        driver = Driver(store, clock=lambda: self.clock, pause=pause, beats=beats)
        context = Context(store, Path(), NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]
        outputs = {"make": MakeOutput, "tell": TellOutput}
        nodes = [
            replace(node, kind=replace(node.kind, work=partial(work, outputs[node.kind.name])))
            for node in workflow.graph(self.recipe, store)
        ]

        def say(node: workflow.Node, event: str, text: str) -> None:
            self.finished[node.name] += event == "finished"
            self.said.append((process, node.name, event, text))

        return workflow.run(nodes, context, say, driver)

    def check(self) -> None:
        """At every moment the store tells of each attempt what became of it."""
        for key in {layout.ATTEMPTS.at(**parts) for parts in map(layout.HELD.parse, self.keys()) if parts}:
            _, kind, digest, _ = key.split("/")
            attempts = tried(self.store, kind, digest)
            assert [one.attempt.number for one in attempts] == list(range(1, len(attempts) + 1))
            assert all(one.end is not None for one in attempts[:-1]), "one began before the end of the one before it"
            committed = [one for one in attempts if one.end is not None and one.end.how == "committed"]
            assert len(committed) <= 1
            assert committed in ([], attempts[-1:])
            is_recorded = self.store.exists(layout.STAGE.at(kind=kind, digest=digest))
            assert not is_recorded or committed
            assert is_recorded or not (committed and committed[0].recorded)
            for one in attempts:
                taken = one.end is not None and one.end.how == "taken over"
                assert not taken or "nothing was heard of" in one.end.why  # type: ignore[union-attr]
                state, why = told(one, 0.0)
                assert state in ("done", "taken over") or (state, "is at work" in why) == ("running", True)

    def keys(self) -> list[str]:
        return [entry.key for entry in self.store.list("attempts/")]


@pytest.fixture
def twelve(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(context: Context, settings: Any, inputs: Any) -> MakeOutput:
        raise AssertionError("each driver brings its own work")

    kinds = {"make": StageKind("make", Made, none), "tell": StageKind("tell", Made, none, reads_all=True)}
    monkeypatch.setattr(parsing, "KINDS", kinds)
    monkeypatch.setattr(workflow, "versions", lambda: {"pixnerd": "0"})
    monkeypatch.setattr(logging, "lastResort", None)  # drivers in threads would put each other's back


def holds(world: World) -> None:
    """Everybody comes to the same end, from wherever they are."""
    results = world.finish()
    world.check()
    assert world.wrong == []
    nodes = workflow.graph(world.recipe, world.store)
    committed = Counter(end.record.digest_of_work for end in ends(world.store) if end.record is not None)
    assert committed == dict.fromkeys((node.digest for node in nodes), 1)
    assert {digest for digest, _ in world.holders} == committed.keys()
    assert all(len(drivers) == 1 for drivers in world.holders.values()), "two drivers had the same attempt"
    assert max(world.finished.values()) == 1, "two drivers have done the same"
    for result in results:
        assert {name: record.digest_of_work for name, record in result.items()} == {n.name: n.digest for n in nodes}
    recorded = {node.name: world.store.get(node.key) for node in nodes}
    world.finish()
    assert {node.name: world.store.get(node.key) for node in nodes} == recorded


def ends(store: Store) -> list[AttemptEnd]:
    return [read_record(store, key, AttemptEnd) for key in layout.ENDED.keys(store)]


@pytest.mark.usefixtures("twelve")
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ACTIONS)
def test_each_stage_is_committed_once_whatever_is_killed(actions: list[tuple[int, str, int]]):
    world = World(Memory())
    world.play(actions)
    holds(world)


@pytest.mark.usefixtures("twelve")
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "asleep"])
def test_at_each_store_call_a_driver_may_end_or_fall_asleep(killed: bool):
    """One driver comes so far; another one does the rest; if the first was only asleep, it then goes on."""
    calls, taken_over = 0, set[str]()
    while True:
        world = World(Memory())
        first = Process(world.drive)
        first.go(calls)
        if first.ended:
            break
        if killed:
            first.kill()
        else:
            world.drivers[0] = first
        second = world.drivers[1] = Process(world.drive)
        second.go(100_000)
        assert second.ended
        holds(world)
        taken_over |= {end.how for end in ends(world.store)}
        calls += 1
    assert calls > 100
    assert taken_over == {"committed", "taken over"}


@pytest.mark.usefixtures("twelve")
def test_two_drivers_may_come_between_any_two_calls_of_each_other_at_one_stage():
    for first_calls in range(14):
        for second_calls in range(40):
            for more_calls in (1, 3):
                world = World(Memory(), ONE)
                one, other = Process(world.drive), Process(world.drive)
                world.drivers = [one, other]
                one.go(first_calls)
                other.go(second_calls)
                one.go(more_calls)
                other.go(1000)
                holds(world)


@pytest.mark.usefixtures("twelve")
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ACTIONS)
def test_the_same_in_a_folder(tmp_path: Path, actions: list[tuple[int, str, int]]):
    world = World(open_store(str(tmp_path / uuid.uuid4().hex)))
    world.play(actions)
    holds(world)


@pytest.mark.skipif("PIXNERD_TEST_S3_ENDPOINT" not in os.environ, reason="`make test-s3` starts a server")
@pytest.mark.usefixtures("twelve")
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ACTIONS)
def test_the_same_on_a_real_server(actions: list[tuple[int, str, int]]):
    endpoint = os.environ["PIXNERD_TEST_S3_ENDPOINT"]
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="pixnerd-lease")
    given = StoreSettings(endpoint_url=endpoint, region="us-east-1")
    world = World(open_store(f"s3://pixnerd-lease/{uuid.uuid4().hex}", given))
    world.play(actions)
    holds(world)


@pytest.mark.usefixtures("twelve")
def test_two_drivers_at_once_share_the_stages_and_say_who_has_which():
    world = World(Memory())
    one, other = Process(world.drive), Process(world.drive)
    world.drivers = [one, other]
    holds(world)  # they go on in turns
    assert set(world.finished.values()) == {1} and world.finished.keys() == {*NEEDS, "page"}
    by = {
        driver: [name for who, name, event, _ in world.said if who is driver and event == "finished"]
        for driver in (one, other)
    }
    assert len(by[one]) >= 3 and len(by[other]) >= 3
    waits = [text for who, _, event, text in world.said if event == "waiting"]
    assert waits and all(f"@{socket.gethostname()} (process {os.getpid()}, since " in text for text in waits)
    assert len(waits) == len({(who, name) for who, name, event, _ in world.said if event == "waiting"}), "told twice"


def test_what_a_killed_process_has_held_is_taken_over_at_once(tmp_path: Path):
    store = open_store(str(tmp_path))
    script = f"""
import os
from infra.store import open_store
from orchestration.lease import Driver
Driver(open_store({store.url!r})).take("a", "make", "0123")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    lease = Driver(store).take("a", "make", "0123")
    assert isinstance(lease, Lease) and lease.attempt.number == 2
    first, second = tried(store, "make", "0123")
    assert first.end is not None and first.end.how == "taken over" and "is gone" in first.end.why
    assert second.end is None


def test_a_deleted_record_means_that_the_work_is_done_anew(tmp_path: Path):
    store = open_store(str(tmp_path))
    record = StageRecord(
        stage="a", kind="corpus", digest_of_work="0123", inputs={}, settings={}, versions={}, started="", seconds=0,
        output=CorpusOutput(folder="x", files={}),
    )  # fmt: skip
    lease = Driver(store).take("a", "corpus", "0123")
    assert isinstance(lease, Lease)
    assert lease.commit(record) == record
    assert Driver(store).take("a", "corpus", "0123") == record
    store.delete(layout.STAGE.at(kind="corpus", digest="0123"))
    again = Driver(store).take("a", "corpus", "0123")
    assert isinstance(again, Lease) and again.attempt.number == 2

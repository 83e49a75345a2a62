"""SIGKILL to a worker, to the driver and to a whole node, at any moment: whoever goes on ends with the same bytes.

A trap goes off at the n-th thing that happens (a picture that is decoded, a write to the store), so a moment is as
random as its number and as repeatable. The soak kills from outside, whenever a clock says so.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.images.decode import Decoded, decode
from data_prep.prepare import originals
from data_prep.prepare.job import Progress, _done, prepare
from data_prep.prepare.plan import PrepareSettings, make_plan
from data_prep.rejections import Rejection
from data_prep.upkeep.drop import drop
from data_prep.upkeep.verify import verify
from infra.config import parse
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import FileStore, Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import DOWNLOADED, contents, prepare_here, shaded, write_corpus
from tests.data_prep.corpora import settings_for as settings_for_tables
from tests.data_prep.test_job import refuse
from tests.data_prep.web import Page, Web

pytestmark = pytest.mark.usefixtures("ray_cluster")

Whom = Literal["worker", "driver", "node"]

ROWS = 7  # URLs of a batch here, so that there are several
URLS = 20
PATIENCE = 200.0  # seconds until something that must happen is held not to happen; machines may be busy


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "ROWS", ROWS)


def until(happened: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


# Traps


class Trap(NamedTuple):
    """Kills when it hears of the `at`-th event, in whatever process that is."""

    log: str  # a file that holds one byte for each event
    at: int
    whom: Whom
    driver: int = 0
    raylet: int = 0  # of the node that is to die

    def hear(self) -> None:
        if self.whom != "driver" and os.getpid() == self.driver:
            return
        if self.whom == "node" and os.getppid() != self.raylet:
            # The other node has work enough to get on without this one, and must not.
            until(self.sprung, "the end of the node")
            return
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, b".")
        count = os.lseek(file, 0, os.SEEK_CUR)
        os.close(file)
        if count == self.at:
            self._kill()

    def sprung(self) -> bool:
        return os.path.exists(self.log) and os.path.getsize(self.log) >= self.at

    def _kill(self) -> None:
        if self.whom == "node":
            for pid in children(self.raylet) - {os.getpid()}:
                kill(pid)
            kill(self.raylet)
        kill(self.driver if self.whom == "driver" else os.getpid())


class TrappedStore(FileStore):
    """Events are what changes it."""

    def __init__(self, root: Path, trap: Trap) -> None:
        super().__init__(root)
        self.trap = trap

    def put(self, key: str, data: bytes | Path) -> None:
        self.trap.hear()
        super().put(key, data)

    def create(self, key: str, data: bytes | Path) -> bool:
        if not self.exists(key):
            self.trap.hear()
        return super().create(key, data)

    def delete(self, key: str) -> None:
        if self.exists(key):
            self.trap.hear()
        super().delete(key)


def decode_trapped(trap: Trap, data: bytes, **options: Any) -> Decoded | Rejection:
    trap.hear()
    return decode(data, **options)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> set[int]:
    return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid}


def descendants(pid: int) -> set[int]:
    return set().union(*({child} | descendants(child) for child in children(pid)))


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _parent(stat: Path) -> int | None:
    with suppress(OSError):
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return None


# What is prepared


@dataclass(frozen=True)
class Scene:
    """A table of images and a list of URLs, what an undisturbed run makes of them, and how many things happen in it."""

    settings: dict[str, Any]
    undisturbed: dict[str, bytes]
    events: int

    def store(self, folder: Path) -> FileStore:
        """All downloads are there, and nothing else."""
        store = FileStore(folder)
        for key, data in self.undisturbed.items():
            if key.startswith(DOWNLOADED):
                store.put(key, data)
        return store


def both_sources(tables: Path, lists: Path) -> dict[str, Any]:
    given = settings_for_tables(tables).model_dump(mode="json")
    listed = {"kind": "url_list", "name": "web", "url": str(lists), "tables": ["*.parquet"]}
    # Originals lie in the order in which they came: one after the other, that is always the same.
    fetch = {"allow_private": True, "retries": 0, "at_once": 1}
    return given | {"sources": [*given["sources"], listed], "fetch": fetch}


def photo(number: int) -> bytes:
    return zoo.saved(shaded(number, 40), "PNG")


BROKEN = [files[-1] for files in zoo.undecodable().values()]


def listed(count: int) -> dict[str, Page]:
    """Every third is what nobody can decode, for each cause in turn: what is said of it must be the same each time."""
    files = [(photo(number), BROKEN[number // 3 % len(BROKEN)]) for number in range(count)]
    return {f"/{number}": bad if number % 3 == 0 else good for number, (good, bad) in enumerate(files)}


def write_list(folder: Path, web: Web, pages: dict[str, Page]) -> None:
    folder.mkdir(parents=True)
    web.pages |= pages
    rows = [{"url": web.url(name), "caption": f"picture {name}"} for name in pages]
    pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> Scene:
    folder = tmp_path_factory.mktemp("kills")
    write_corpus(folder / "tables", 50)
    with Web() as web, pytest.MonkeyPatch.context() as patch:
        patch.setattr(originals, "ROWS", ROWS)
        write_list(folder / "lists", web, listed(URLS))
        settings = both_sources(folder / "tables", folder / "lists")
        FileStore(folder / "first")
        prepare(FileStore(folder / "first"), parse(PrepareSettings, settings | {"in_flight": 1}))
        undisturbed = contents(FileStore(folder / "first"))
        # Once more from the downloads, in a trap that never goes off.
        found = Scene(settings, undisturbed, 0)
        trap = Trap(str(folder / "events"), 10**9, "worker", os.getpid())
        prepare_trapped(found.store(folder / "second"), settings, trap)
    # The web is gone: whoever asks it again ends with other bytes.
    assert contents(open_store(str(folder / "second"))) == undisturbed
    return Scene(settings, undisturbed, os.path.getsize(trap.log))


def prepare_trapped(store: FileStore, settings: dict[str, Any], trap: Trap) -> None:
    decoder = partial(decode_trapped, trap)
    prepare(TrappedStore(store.root, trap), parse(PrepareSettings, settings), decoder=decoder)


def finish(store: Store, scene: Scene) -> None:
    """Go on from wherever it is; and once more, when nothing is left to do."""
    settings = parse(PrepareSettings, scene.settings)
    summary = prepare(store, settings)
    assert contents(store) == scene.undisturbed
    assert prepare(store, settings, decoder=refuse) == summary
    assert verify(store, summary.plan, summary.edition).problems == []


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_damaged_is_dropped_and_made_again_with_the_same_bytes(scene: Scene, tmp_path: Path, seed: int) -> None:
    """No object is left that nothing names, and none is new: what is said of the undecodable is the same each time."""
    rng = random.Random(seed)
    store = FileStore(tmp_path / "store")
    for key, data in scene.undisturbed.items():
        store.put(key, data)
    summary = prepare(store, parse(PrepareSettings, scene.settings), decoder=refuse)
    hurt = [key for key in sorted(scene.undisturbed) if key.startswith(("shards/", "data/16/", "data/32/"))]
    for key in rng.sample(hurt, len(hurt) // 3):
        whole = scene.undisturbed[key]
        if rng.random() < 0.3:
            store.delete(key)
        else:
            store.put(key, whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    found = verify(store, summary.plan, summary.edition)
    assert found.problems
    drop(store, summary.plan, found)
    finish(store, scene)


# Every write


def in_one_process(store: Store, settings: dict[str, Any]) -> None:
    """All that `prepare` writes but the summary, in one process, in order; what has its record is left alone."""
    originals.ROWS = ROWS
    given = parse(PrepareSettings, settings)
    plan = make_plan(store, given)
    done = {shard.number for shard, _ in _done(store, plan)}
    left = [shard for shard in plan.shards if shard.number not in done]
    prepare_here(store, given, replace(plan, shards=left))


def one_write_further(function: Callable[..., None], root: Path, settings: dict[str, Any], log: Path) -> int:
    """Run it in a process that is killed before its second write; its exit code."""
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")  # this process has threads, and Ray's
    context.set_forkserver_preload(["data_prep.prepare.shard", "data_prep.prepare.job", "torch", __name__])
    store = TrappedStore(root, Trap(str(log), 2, "worker"))
    process = context.Process(target=function, args=(store, settings))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_killed_at_every_write_it_gets_one_further_each_time(tmp_path: Path) -> None:
    write_corpus(tmp_path / "tables", 10)
    with Web() as web:
        write_list(tmp_path / "lists", web, listed(9))
        settings = both_sources(tmp_path / "tables", tmp_path / "lists")
        plain, killed = open_store(str(tmp_path / "plain")), FileStore(tmp_path / "killed")
        in_one_process(plain, settings)
        seen, objects = 0, []
        while (code := one_write_further(in_one_process, killed.root, settings, tmp_path / "log")) != 0:
            assert code == -signal.SIGKILL
            objects.append(len(contents(killed)))
            seen += 1
            assert seen < 100
    assert contents(killed) == contents(plain)
    assert objects == list(range(1, len(contents(plain))))  # each time one more, and that the last time to the end


def only_the_end(store: Store, settings: dict[str, Any]) -> None:
    originals.ROWS = ROWS
    prepare(store, parse(PrepareSettings, settings), decoder=refuse)


def test_originals_that_are_not_kept_go_whenever_it_is_killed(scene: Scene, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    for key, data in scene.undisturbed.items():
        if not key.startswith("prepared/"):
            store.put(key, data)
    settings = scene.settings | {"keep_originals": False}
    kills = 0
    while one_write_further(only_the_end, store.root, settings, tmp_path / "log") != 0:
        kills += 1
        assert kills < 100
    assert kills >= 3
    assert not [entry.key for entry in store.list("data/originals/") if entry.key.endswith(".tar")]
    left = {key for key in scene.undisturbed if not (key.startswith("data/originals/") and key.endswith(".tar"))}
    after = contents(store)
    dropped = {after.pop(key) for key in list(after) if key.endswith(".dropped.json")}
    assert after == {key: scene.undisturbed[key] for key in left}
    assert len(dropped) == -(-URLS // ROWS)


# A worker


def moment(scene: Scene, seed: int) -> int:
    return random.Random(seed).randint(1, scene.events)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_worker_killed_at_any_moment_costs_nothing(scene: Scene, tmp_path: Path, seed: int) -> None:
    store = scene.store(tmp_path / "store")
    trap = Trap(str(tmp_path / "log"), moment(scene, seed), "worker", os.getpid())
    prepare_trapped(store, scene.settings, trap)
    assert trap.sprung()
    finish(store, scene)


# The driver and a node, on clusters of their own: Ray ends other drivers along with one that is killed


class Order(NamedTuple):
    """What a driver is told, as JSON."""

    folder: str  # of its cluster; short, since sockets lie in it
    store: str
    settings: dict[str, Any]
    nodes: int
    trap: list[Any] | None


def drive() -> None:
    """A prepare in a process of its own with a cluster of its own."""
    import ray
    from ray.cluster_utils import Cluster

    order = Order(*json.loads(sys.argv[1]))
    originals.ROWS = ROWS
    said: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    raylet = 0
    if order.nodes == 1:
        ray.init(address="local", _temp_dir=order.folder, include_dashboard=False, **node, **said)
    else:
        # Notice within seconds that a node is gone; one that is merely slow is given its ten seconds for each answer.
        checks = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300}
        head = {"include_dashboard": False, "temp_dir": order.folder, "_system_config": checks}
        # Ray notes a new cluster's address in a folder that is not there where Ray has never run.
        Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray").mkdir(exist_ok=True)
        cluster = Cluster(initialize_head=True, head_node_args={**node, **head})
        raylet = cluster.add_node(**node).all_processes["raylet"][0].process.pid
        ray.init(address=cluster.address, **said)
    store, settings = FileStore(Path(order.store)), parse(PrepareSettings, order.settings)
    print("ready", raylet, flush=True)
    if order.trap is None:
        prepare(store, settings)
    else:
        trap = Trap(*order.trap)._replace(driver=os.getpid(), raylet=raylet)
        prepare_trapped(store, order.settings, trap)


class Started(NamedTuple):
    process: subprocess.Popen[str]
    mark: str  # in the environment of all that it starts

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said

    def pids(self) -> list[int]:
        """All that run."""
        return list(marked(self.mark))


@contextmanager
def driver(store: FileStore, settings: dict[str, Any], nodes: int = 1, trap: Trap | None = None) -> Iterator[Started]:
    """A started driver; at the end it is gone, with its cluster."""
    mark = uuid.uuid4().hex
    folder = Path("/tmp", f"pn-{mark[:8]}")
    order = Order(str(folder), str(store.root), settings, nodes, trap and list(trap))
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.data_prep.test_kills import drive; drive()", json.dumps(order)],
        env={**os.environ, "PIXNERD_TEST_DRIVER": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Started(process, mark)
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
        until(lambda: not _end(mark), "the end of the driver's cluster")
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def _end(mark: str) -> list[int]:
    left = list(marked(mark))
    for pid in left:
        kill(pid)
    return left


def marked(mark: str) -> Iterator[int]:
    """Processes that were started with this mark in their environment, by whatever way."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"PIXNERD_TEST_DRIVER={mark}".encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def test_a_driver_killed_at_any_moment_is_finished_by_the_next(scene: Scene, tmp_path: Path) -> None:
    store = scene.store(tmp_path / "store")
    trap = Trap(str(tmp_path / "log"), moment(scene, 3), "driver")
    with driver(store, scene.settings, trap=trap) as started:
        code, said = started.end()
        assert code == -signal.SIGKILL, said
        # Its workers may not know yet: the next driver begins beside them.
        finish(store, scene)


@pytest.mark.slow
def test_a_node_killed_at_any_moment_costs_nothing(scene: Scene, tmp_path: Path) -> None:
    store = scene.store(tmp_path / "store")
    trap = Trap(str(tmp_path / "log"), 1 + moment(scene, 4) // 4, "node")
    with driver(store, scene.settings, 2, trap) as started:
        code, said = started.end()
        assert code == 0, said
    assert trap.sprung()
    assert contents(store) == scene.undisturbed
    finish(store, scene)


# Downloads


@pytest.mark.slow
def test_a_driver_killed_during_its_downloads_loses_no_row(tmp_path: Path) -> None:
    tried: Counter[str] = Counter()

    def works_the_second_time(name: str, number: int) -> Page:
        async def page(request: Any, stream: Any) -> None:
            tried[name] += 1
            await stream.answer(photo(number), status=200 if tried[name] > 1 else 503)

        return page

    started: list[Started] = []

    async def fatal(request: Any, stream: Any) -> None:
        tried[request.target] += 1
        if tried[request.target] == 1:
            started[0].process.kill()
        await stream.answer(photo(0))

    write_corpus(tmp_path / "tables", 10)
    with Web() as web:
        pages: dict[str, Page] = {f"/{n}": photo(n) for n in range(40)}
        pages |= {f"/{n}": works_the_second_time(f"/{n}", n) for n in range(0, 40, 4)}
        pages["/30"] = fatal
        write_list(tmp_path / "lists", web, pages)
        settings = both_sources(tmp_path / "tables", tmp_path / "lists")
        settings["fetch"] |= {"at_once": 2}
        store = FileStore(tmp_path / "store")
        with driver(store, settings) as found:
            started.append(found)
            code, said = found.end()
            assert code == -signal.SIGKILL, said
            before = contents(store)
            summary = prepare(store, parse(PrepareSettings, settings))
        asked = len(web.requests)
        again = prepare(store, parse(PrepareSettings, settings), decoder=refuse)
        assert (again, len(web.requests)) == (summary, asked)
    after = contents(store)
    assert {key: after[key] for key in before} == before
    assert summary.inputs == 10 + 40
    for size in ("32", "16"):
        records = list_shards(store, shard_prefix(summary.plan, size))
        rows = [row for record in records for row in read_index(store, record).to_pylist()]
        assert sorted(row["row"] for row in rows if row["source"] == "web") == list(range(40))
        assert len({row["key"] for row in rows}) == len(rows) == 50
        causes = Counter(row["cause"] for row in rows if row["source"] == "web")
        # What had failed when the first driver was killed stays so, if it was written down; the rest came then.
        assert causes[None] + causes["server_error"] == 40
        assert causes[None] >= 30
    assert verify(store, summary.plan, summary.edition).problems == []


def test_a_worker_killed_during_its_downloads_costs_nothing(tmp_path: Path) -> None:
    killed: list[int] = []

    async def fatal(request: Any, stream: Any) -> None:
        if not killed:
            killed.extend(pid for pid in descendants(os.getpid()) if command(pid).startswith(b"ray::_download"))
            for pid in killed:
                kill(pid)
        await stream.answer(photo(11))

    write_corpus(tmp_path / "tables", 10)
    with Web() as web:
        write_list(tmp_path / "lists", web, {f"/{n}": photo(n) for n in range(URLS)} | {"/11": fatal})
        settings = both_sources(tmp_path / "tables", tmp_path / "lists")
        stores = FileStore(tmp_path / "killed"), FileStore(tmp_path / "plain")
        for store in stores:
            prepare(store, parse(PrepareSettings, settings))
    assert killed
    assert contents(stores[0]) == contents(stores[1])


# A corpus that grows


def growing(folder: Path, in_flight: int) -> PrepareSettings:
    found = settings_for_tables(folder, in_flight=in_flight)
    return found.model_copy(update={"sources": [found.sources[0].model_copy(update={"tables": ["*.parquet"]})]})


@pytest.mark.slow
def test_one_driver_extends_the_plan_while_another_works_on_it(tmp_path: Path) -> None:
    folder, store = tmp_path / "corpus", FileStore(tmp_path / "store")
    causes = Counter(write_corpus(folder, 50))
    others: list[Started] = []

    def grow(progress: Progress) -> None:
        """The folder grows when the first shards are there, and another driver has planned before the work goes on."""
        if progress.shards < 2 or others:
            return
        whole = pq.read_table(folder / "table.parquet")
        for number in range(3):
            pq.write_table(whole.slice(10 * number, 10), folder / f"later-{number}.parquet")
        settings = growing(folder, 1).model_dump(mode="json")
        others.append(stack.enter_context(driver(store, settings)))
        until(lambda: sum(entry.key.endswith(".parquet") for entry in store.list("plans/")) > 1, "the extension")

    with ExitStack() as stack:
        first = prepare(store, growing(folder, 1), grow)
        code, said = others[0].end()
        assert code == 0, said
    second = prepare(store, growing(folder, 2), decoder=refuse)
    assert (first.inputs, second.inputs) == (50, 80)
    assert (first.plan, first.edition != second.edition) == (second.plan, True)
    assert first.sizes["16"].rejected == causes
    assert second.sizes["16"].rejected == causes + Counter(dict.fromkeys(causes, 3))
    records = list(list_shards(store, shard_prefix(second.plan, "16")))
    rows = [row for record in records for row in read_index(store, record).to_pylist()]
    # The later tables name 30 of the pictures again, which have their keys in these shards, too.
    assert Counter(Counter(row["key"] for row in rows).values()) == {1: 20, 2: 30}
    for summary in (first, second):
        assert verify(store, summary.plan, summary.edition).problems == []
    made = Counter(key.partition("/")[0] for key in contents(store))
    assert made == {"plans": 2 + 2, "shards": 2 * 13, "data": 2 * 2 * 13, "prepared": 2, "looked": 13}


# The soak


def victims(started: Started, whom: Whom, raylet: int) -> set[int]:
    if whom == "driver":
        return {started.process.pid}
    if whom == "node":
        return {raylet, *children(raylet)}
    tasks = {pid for pid in started.pids() if command(pid).startswith((b"ray::_make", b"ray::_download"))}
    return {min(tasks)} if tasks else set()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(2))
def test_killed_by_the_clock_again_and_again(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    write_corpus(tmp_path / "tables", 400)
    with Web() as web:
        write_list(tmp_path / "lists", web, listed(100))
        settings = both_sources(tmp_path / "tables", tmp_path / "lists")
        plain = open_store(str(tmp_path / "plain"))
        prepare(plain, parse(PrepareSettings, settings))
        store, ends = FileStore(tmp_path / "store"), Counter[Any]()
        for _ in range(3):
            with driver(store, settings, 2) as started:
                assert started.process.stdout is not None
                raylet = int(started.process.stdout.readline().split()[1])
                while started.process.poll() is None:
                    time.sleep(rng.uniform(0, 8))
                    whom: Whom = rng.choice(["worker", "worker", "driver", "node"])
                    for pid in victims(started, whom, raylet):
                        kill(pid)
                    ends[whom] += 1
                code, said = started.end()
            # What has lost its worker too often gives up, and says so.
            assert code in (0, -signal.SIGKILL) or "kills its worker" in said, said
        summary = prepare(store, parse(PrepareSettings, settings))
    assert contents(store) == contents(plain)
    assert verify(store, summary.plan, summary.edition).problems == []

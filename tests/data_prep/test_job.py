from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_prep.images.decode import Decoded, decode
from data_prep.prepare import job, originals
from data_prep.prepare.job import Progress, check_accepted, prepare
from data_prep.prepare.plan import make_plan
from data_prep.rejections import Cause, Rejection
from data_prep.upkeep.verify import verify
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.errors import ClusterError, DataError
from infra.records import PrepareSummary, SizeSummary
from infra.shards import list_shards, read_index
from infra.store import FileStore, Store, open_store
from tests.data_prep import zoo
from tests.data_prep.corpora import contents, prepare_here, settings_for, shaded, write_corpus
from tests.data_prep.test_sources_tars import member, tar_bytes
from tests.data_prep.web import Request, Stream, Web

pytestmark = pytest.mark.usefixtures("ray_cluster")

COUNT = 50


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "corpus"
    write_corpus(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the corpus, shard after shard: the bytes that every other way must give."""
    store = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    prepare_here(store, settings_for(corpus))
    return contents(store)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def assert_as_undisturbed(store: Store, undisturbed: dict[str, bytes], summary: PrepareSummary) -> None:
    found = contents(store)
    assert json.loads(found.pop(layout.PREPARED.at(plan=summary.plan, edition=summary.edition))) == summary.model_dump(
        mode="json"
    )
    assert sorted(found) == sorted(undisturbed)
    assert found == undisturbed


def refuse(*_: Any, **__: Any) -> Decoded:
    raise AssertionError("nothing was left to decode")


def test_counts_add_up_and_a_second_run_does_nothing(corpus: Path, store: Store, tmp_path: Path) -> None:
    causes = write_corpus(tmp_path / "again", COUNT)
    seen: list[Progress] = []
    summary = prepare(store, settings_for(corpus), seen.append)
    assert summary.inputs == COUNT
    for size in ("32", "16"):
        here = summary.sizes[size]
        assert here.rejected == causes
        assert here.accepted + sum(here.rejected.values()) == COUNT
        rows = [row for record in list_shards(store, here.shards) for row in read_index(store, record).to_pylist()]
        assert [row["row"] for row in rows] == list(range(COUNT))
        assert sum(row["accepted"] for row in rows) == here.accepted
        assert all((row["cause"] is None) == row["accepted"] == (row["offset"] is not None) for row in rows)
        assert {row["cause"] for row in rows} == {None, *causes}
    assert [progress.inputs for progress in seen] == sorted(progress.inputs for progress in seen)
    assert (seen[0].inputs, seen[-1].inputs, seen[-1].shards) == (0, COUNT, 7)
    assert seen[-1].rejected == dict.fromkeys(("32", "16"), causes)
    found = verify(store, summary.plan, summary.edition)
    assert found[:3] == (14, 2 * COUNT, 2 * summary.sizes["32"].accepted)
    assert found.problems == []
    assert prepare(store, settings_for(corpus), decoder=refuse) == summary
    store.delete(layout.PREPARED.at(plan=summary.plan, edition=summary.edition))
    assert prepare(store, settings_for(corpus), decoder=refuse) == summary


def test_what_another_run_makes_meanwhile_is_used_and_not_counted_as_ones_own(corpus: Path, store: Store) -> None:
    settings = settings_for(corpus, in_flight=1)
    seen: list[Progress] = []

    def beside(progress: Progress) -> None:
        if progress.shards == 1:
            prepare_here(store, settings)  # all of it, as another run would
        seen.append(progress)

    summary = prepare(store, settings, beside)
    assert summary.inputs == seen[-1].inputs == COUNT
    assert seen[1].own_inputs == 8
    assert 8 <= seen[-1].own_inputs <= 16, "the one that was under way at most"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_whoever_did_the_work(
    corpus: Path, store: Store, undisturbed: dict[str, bytes], workers: int
) -> None:
    summary = prepare(store, settings_for(corpus, in_flight=workers))
    assert_as_undisturbed(store, undisturbed, summary)


def summary_of(sizes: dict[str, tuple[int, dict[str, int]]]) -> PrepareSummary:
    made = {
        size: SizeSummary(shards="", count=1, accepted=accepted, rejected=rejected)
        for size, (accepted, rejected) in sizes.items()
    }
    return PrepareSummary(plan="", edition="", inputs=9, tried_again={}, sizes=made, versions=[])


def test_where_nothing_was_accepted_the_setting_is_named_that_refused_most(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"accepted: 9 rejected \(6 too_small, 3 gone\): lower `sizes`"):
        check_accepted(summary_of({"64": (0, {"gone": 3, "too_small": 6}), "512": (0, {"gone": 3, "too_small": 6})}))
    with pytest.raises(DataError, match=r"the sources hold no images"):
        check_accepted(summary_of({"64": (0, {})}))
    assert not caplog.messages
    check_accepted(summary_of({"64": (9, {}), "512": (0, {"too_small": 9})}))
    assert caplog.messages == [
        "no image was accepted at size 512: 9 rejected (9 too_small): lower `sizes`: pictures are never enlarged"
    ]


def test_every_cause_tells_what_to_do() -> None:
    assert all(len(cause.remedy) > 10 for cause in Cause)
    assert pickle.loads(pickle.dumps(Cause.DNS)) is Cause.DNS is Cause("dns")
    assert json.dumps(Cause.DNS) == '"dns"'


STOPPED = """
import os, signal, sys
from pathlib import Path
from data_prep.prepare.job import prepare
from infra.cluster import ClusterSettings, connect
from infra.errors import Stopped
from infra.store import open_store
from tests.data_prep.corpora import settings_for

def stop(progress):
    if progress.shards == 1:
        os.kill(os.getpid(), signal.SIGTERM)

connect(ClusterSettings(address=sys.argv[3]))
before = signal.getsignal(signal.SIGTERM)
try:
    prepare(open_store(sys.argv[1]), settings_for(Path(sys.argv[2]), in_flight=1), stop)
except Stopped as error:
    assert signal.getsignal(signal.SIGTERM) is before
    print(error)
"""


def test_sigterm_stops_between_shards_and_the_next_run_goes_on(
    ray_cluster: str, corpus: Path, store: Store, undisturbed: dict[str, bytes]
) -> None:
    # In a process of its own: where the signal is not caught, it ends no more than that.
    command = [sys.executable, "-c", STOPPED, store.url, str(corpus), ray_cluster]
    driver = subprocess.run(command, timeout=240, stdout=subprocess.PIPE, text=True)
    assert driver.returncode == 0
    assert re.search(r"stopped by SIGTERM.*run the same command again", driver.stdout)
    plan = make_plan(store, settings_for(corpus))
    assert sum(1 for _ in list_shards(store, f"shards/{plan.digest}/16/")) < len(plan.shards)
    assert_as_undisturbed(store, undisturbed, prepare(store, settings_for(corpus)))


def deadly(data: bytes, **options: Any) -> Decoded | Rejection:
    if data.startswith(b"DEADLY"):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, **options)


def test_a_file_that_kills_its_decoder_is_rejected_and_nothing_else_is(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    causes = write_corpus(folder, 20)
    (folder / "images" / "00018.jpeg").write_bytes(b"DEADLY")
    summary = prepare(store, settings_for(folder), decoder=deadly)
    assert summary.sizes["16"].rejected == causes | {Cause.DECODER_CRASH: 1}
    crashed = [
        (row["row"], row["detail"])
        for record in list_shards(store, summary.sizes["16"].shards)
        for row in read_index(store, record).to_pylist()
        if row["cause"] == Cause.DECODER_CRASH
    ]
    assert crashed == [(18, "the decoder's process ended with -9")]
    assert verify(store, summary.plan, summary.edition).problems == []


def dies_once(marker: str, data: bytes, **options: Any) -> Decoded | Rejection:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return decode(data, **options)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_dies_once_costs_nothing(
    corpus: Path, store: Store, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    summary = prepare(store, settings_for(corpus), decoder=partial(dies_once, str(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()
    assert_as_undisturbed(store, undisturbed, summary)


def signs(folder: Path, data: bytes, **options: Any) -> Decoded | Rejection:
    """Tells which process it is."""
    (folder / str(os.getpid())).touch()
    return decode(data, **options)


def test_a_worker_makes_so_many_shards_and_no_more(
    corpus: Path, store: Store, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "WORKER_LIFE", 3)
    (tmp_path / "workers").mkdir()
    summary = prepare(store, settings_for(corpus), decoder=partial(signs, tmp_path / "workers"))
    workers = len(list((tmp_path / "workers").iterdir()))
    assert 3 <= workers < 7, "of seven shards"
    assert_as_undisturbed(store, undisturbed, summary)


# Downloads


def url_list(folder: Path, web: Web, count: int, **changes: Any) -> dict[str, Any]:
    """The settings of a list of the web's pages /0 to /`count`."""
    folder.mkdir()
    lines = [json.dumps({"url": web.url(f"/{number}"), "caption": f"picture {number}"}) for number in range(count)]
    (folder / "list.jsonl").write_text("\n".join(lines))
    source = {"kind": "url_list", "name": "web", "url": str(folder), "tables": ["list.jsonl"]}
    return {"sources": [source], "sizes": [16], "rows_per_shard": 100, **changes}


def photo(number: int) -> bytes:
    return zoo.saved(shaded(number, 40), "PNG")


class DeadlyStore(FileStore):
    """The first `deaths` processes that are about to write down what they downloaded die of it."""

    def __init__(self, root: Path, log: Path, deaths: int) -> None:
        super().__init__(root)
        self.log, self.deaths = log, deaths

    def create(self, key: str, data: bytes | Path) -> bool:
        if key.startswith("downloads/batches/") and self._tried() <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create(key, data)

    def _tried(self) -> int:
        with self.log.open("ab") as file:
            file.write(b".")
            return file.tell()


# Ray by itself starts once more what died with its worker: the second death is the first that the job hears of, and
# after the third the last attempt of all is made.
@pytest.mark.parametrize("deaths", [1, 3])
def test_downloads_whose_worker_dies_are_tried_again(tmp_path: Path, deaths: int) -> None:
    with Web({f"/{number}": photo(number) for number in range(3)}) as web:
        settings = settings_for(tmp_path, **url_list(tmp_path / "list", web, 3, fetch={"allow_private": True}))
        summary = prepare(DeadlyStore(tmp_path / "store", tmp_path / "log", deaths), settings)
    assert (tmp_path / "log").stat().st_size > deaths
    assert (summary.sizes["16"].accepted, summary.sizes["16"].rejected) == (3, {})
    assert verify(open_store(str(tmp_path / "store")), summary.plan, summary.edition).problems == []


def test_downloads_that_kill_every_worker_end_the_job(tmp_path: Path) -> None:
    with Web({"/0": photo(0)}) as web:
        settings = settings_for(tmp_path, **url_list(tmp_path / "list", web, 1, fetch={"allow_private": True}))
        with pytest.raises(ClusterError, match=r"the downloads 0 \(web, list.jsonl\) kills its worker") as error:
            prepare(DeadlyStore(tmp_path / "store", tmp_path / "log", 99), settings)
    assert "out-of-memory" in error.value.remedy
    assert (tmp_path / "log").stat().st_size == 4


def test_all_download_tasks_together_use_up_the_limits_and_keep_to_them(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(originals, "ROWS", 10)
    both = asyncio.Event()
    tasks: set[int] = set()

    async def page(request: Request, stream: Stream) -> None:
        """Answers nobody until both tasks are there, and then takes its time, so that all come who would come."""
        number = int(request.target[1:])
        tasks.add(number // 10)
        if len(tasks) == 2:
            both.set()
        await both.wait()
        await asyncio.sleep(0.3)
        await stream.answer(photo(number))

    # Three tasks, two shares: 2 and 3 from the one host. The third task takes what the first to end gives back.
    with Web({f"/{number}": page for number in range(30)}) as web:
        fetch = {"allow_private": True, "at_once": 32, "per_host": 5}
        settings = settings_for(tmp_path, **url_list(tmp_path / "list", web, 30, in_flight=2, fetch=fetch))
        assert prepare(store, settings).sizes["16"].accepted == 30
        assert web.most_active == 5


@given(tasks=st.integers(0, 50), at_once=st.integers(1, 99), per_host=st.integers(1, 99), ahead=st.integers(1, 99))
def test_shares_are_the_whole_dealt_out_evenly(tasks: int, at_once: int, per_host: int, ahead: int) -> None:
    whole = FetchSettings(at_once=at_once, per_host=per_host, ahead_mib=ahead, seconds=7)
    shares = job._shares(whole, tasks)
    assert len(shares) == min(tasks, at_once, per_host, ahead)
    for name in ("at_once", "per_host", "ahead_mib") if shares else ():
        dealt = [getattr(share, name) for share in shares]
        assert sum(dealt) == getattr(whole, name)
        assert 1 <= min(dealt) <= max(dealt) <= min(dealt) + 1
    assert all((share.seconds, share.results()) == (7, whole.results()) for share in shares)


def test_what_was_estimated_gives_way_to_what_was_counted(store: Store, tmp_path: Path) -> None:
    samples = [
        (f"{number}.{kind}", data) for number in range(3) for kind, data in (("png", photo(number)), ("txt", b"x"))
    ]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "one.tar").write_bytes(tar_bytes(*(member(name, data) for name, data in samples)))
    source = {"kind": "webdataset", "name": "tars", "url": str(tmp_path / "tars")}
    seen: list[Progress] = []
    prepare(store, settings_for(tmp_path, sources=[source], sizes=[16]), seen.append)
    assert [(progress.inputs, progress.planned_inputs) for progress in seen] == [(0, 8), (3, 3)]


def broken(data: bytes, **options: Any) -> Decoded:
    raise DataError("the decoder is out of sorts", remedy="give it a rest")


def test_an_error_in_a_task_reaches_the_caller_as_it_was(corpus: Path, store: Store) -> None:
    with pytest.raises(DataError) as error:
        prepare(store, settings_for(corpus), decoder=broken)
    assert error.value.remedy == "give it a rest"


def test_webdataset_reads_what_was_made(corpus: Path, store: Store) -> None:
    summary = prepare(store, settings_for(corpus))
    records = list(list_shards(store, summary.sizes["32"].shards))
    urls = [store.url.removeprefix("file://") + f"/{record.tar.key}" for record in records if record.tar]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == summary.sizes["32"].accepted
    for sample in samples:
        assert sample["jpg"].shape == (32, 32, 3)
        assert sample["json"]["key"] == sample["__key__"]
        assert [caption["kind"] for caption in sample["json"]["captions"]] == ["short", "long"]
        assert sample["json"]["licence"] == "CC0-1.0"
        assert sample["json"]["objects"] in range(4)
